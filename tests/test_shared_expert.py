"""The shared expert of a layer: where it is, what its last matrix is multiplied with, and how it is written."""

import copy

import pytest
import torch
from all_families import STANDARD, every_run_or_slow, tiny
from torch import nn

from hf_mcsmoe import Recipe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.executors.in_memory import collect
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.families.residual import first_tensor
from hf_mcsmoe.layer.beside import beside_experts, write_beside
from hf_mcsmoe.observation.beside_experts import BesideExperts
from hf_mcsmoe.observation.layer_inputs import LayerInputs
from hf_mcsmoe.observation.shared_features import routed_scale, shared_features

WITHOUT = (  # shared experts that a refit leaves alone, and families that have none
    "axk1",  # a norm comes after the sum
    "ernie4_5_vl_moe",
    "ernie4_5_vl_moe_text",
    "inkling_mm_model",
    "inkling_text",
    "longcat_flash",
    "gemma4_text",
    "mixtral",
)
BESIDE_BLOCK = ("granitemoeshared", "granitemoehybrid", "granitemoe_swa")
SCALED = ("minimax_m3_vl", "minimax_m3_vl_text")


@pytest.fixture(scope="module")
def tokens():
    """Enough for the fit to be better on held-out rows: 120 rows of 20 token ids."""
    return torch.randint(3, 150, (120, 20), generator=torch.Generator().manual_seed(4))


def collected(model, layers, tokens):
    how = {"progress": False, "held_out_tokens": 100, "calibration_tokens": 1000, "refuse_unreached": False}
    return collect(model, layers, load_calibration(tokens), frozenset(), **how)


# --- where it is, and whether it counts


@pytest.mark.parametrize("key", every_run_or_slow([key for key in STANDARD if key not in WITHOUT]))
def test_what_its_features_give_is_what_the_layer_adds_beside_the_routed_experts(key, tokens):
    model = tiny(key)
    layers = [layer for layer in find_layers(model) if layer.shared is not None]
    if not layers:
        assert not any("shared" in name for name, _ in model.named_modules())
        return
    found = collected(model, layers, tokens % 130 + 1)
    scales = {layer.name: routed_scale(layer, found[layer.name].held_out) for layer in layers}
    if all(scale is None for scale in scales.values()):
        assert not found[layers[0].name].held_out.router_calls  # a part of the model that was not run
        return
    for layer in layers:
        assert layer.shared.in_block == (key not in BESIDE_BLOCK)
        assert scales[layer.name] == (2.0 if key in SCALED else 1.0)
        states, index, weights = found[layer.name].held_out.experts_inputs[0]
        added = shared_features(layer.shared, states) @ layer.shared.down.weight.T
        expected = layer.shared.module(states)
        if layer.shared.gate is not None:
            expected = expected * torch.sigmoid(layer.shared.gate(states))
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)
        if layer.shared.in_block and not getattr(layer.block, "is_hash", False):
            routed = layer.experts(states, index, weights)
            output = first_tensor(layer.block(states[None])).reshape(routed.shape)
            torch.testing.assert_close(output, scales[layer.name] * routed + added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", WITHOUT)
def test_what_cannot_be_fitted_is_left_alone(key, tokens):
    model = tiny(key)
    layers = find_layers(model)
    found = collected(model, layers, tokens % 130 + 1)
    for layer in layers:
        assert layer.shared is None or routed_scale(layer, found[layer.name].held_out) is None


def test_a_block_that_adds_something_else_is_left_alone(original, tokens):
    changes = {
        "tanh": lambda block, x: torch.tanh(block.shared_expert_gate(x)) * block.shared_expert(x),
        "twice": lambda block, x: 2 * torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x),
        "other tokens": lambda block, x: (
            torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x.roll(1, 0)).roll(-1, 0)
        ),
        "nothing": lambda block, x: 0 * block.shared_expert(x),
        "as it is": lambda block, x: torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x),
    }
    model = original("qwen2_moe")
    layer = find_layers(model)[0]
    inputs = collected(model, [layer], tokens)[layer.name].held_out
    scales = {}
    for name, change in changes.items():

        class Block(type(layer.block)):
            def forward(self, hidden_states, change=change):
                flat = hidden_states.reshape(-1, hidden_states.shape[-1])
                _, weights, index = self.gate(flat)
                return (self.experts(flat, index, weights) + change(self, flat)).view(hidden_states.shape)

        layer.block.__class__ = Block
        scales[name] = routed_scale(layer, inputs)
    assert scales == {**dict.fromkeys(changes), "as it is": 1.0}
    assert routed_scale(layer, LayerInputs()) is None


def test_modes_of_modules_stay_and_dropout_does_not_hide_the_sum(original, tokens):
    model = original("qwen2_moe")
    layer = find_layers(model)[0]
    inputs = collected(model, [layer], tokens)[layer.name].held_out
    layer.shared.module.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    model.train()
    layer.shared.gate.eval()
    assert routed_scale(layer, inputs) == 1.0
    assert torch.equal(
        shared_features(layer.shared, torch.ones(3, 32)), shared_features(layer.shared, torch.ones(3, 32))
    )
    assert layer.shared.module.act_fn[1].training and not layer.shared.gate.training


class Other(nn.Linear):
    """A linear layer that is more than one."""


def test_a_last_matrix_that_is_shared_or_special_is_not_fitted(original):
    model = original("deepseek_v3")
    first, second = find_layers(model)
    first.shared.module.down_proj.weight = second.shared.module.down_proj.weight
    assert all(layer.shared is None for layer in find_layers(model))
    model = original("deepseek_v3")
    find_layers(model)[0].shared.module.down_proj.__class__ = Other
    assert [layer.shared is not None for layer in find_layers(model)] == [False, True]
    first, second = find_layers(original("deepseek_v3"))
    model = original("deepseek_v3")
    one, other = find_layers(model)
    for name in one.expert_parameters:
        setattr(other.experts, name, getattr(one.experts, name))
    assert all(layer.shared is None for layer in find_layers(model))


@torch.no_grad()
@pytest.mark.parametrize("key", BESIDE_BLOCK)
def test_beside_the_block_it_is_added_to_the_same_stream_as_the_routed_output(key, tokens):
    model = copy.deepcopy(tiny(key))
    layer = find_layers(model)[0]
    seen = {"given": [], "gives": []}
    around = model.get_submodule(layer.block_name.rpartition(".")[0])
    layer.shared.module.register_forward_pre_hook(lambda _, args: seen["given"].append(args[0]))
    layer.block.register_forward_pre_hook(lambda _, args: seen.__setitem__("block", args[0]))
    around.register_forward_hook(lambda _, args, output: seen["gives"].append(first_tensor(output)))  # noqa: ARG005
    model(input_ids=tokens[:2])
    assert torch.equal(seen["given"][0], seen["block"])
    change = torch.randn(layer.shared.down.weight.shape, generator=torch.Generator().manual_seed(1)) / 10
    layer.shared.down.weight += change
    model(input_ids=tokens[:2])
    added = shared_features(layer.shared, seen["given"][0].flatten(0, 1)) @ change.T
    before, after = seen["gives"]
    torch.testing.assert_close(
        (after - before).flatten(0, 1), around.residual_multiplier * added, rtol=1e-3, atol=1e-4
    )


def test_its_matrix_is_rounded_once(original, tokens):
    model = original("qwen2_moe").to(torch.bfloat16)
    layer = find_layers(model)[0]
    old = layer.shared.down.weight.detach().clone()
    change = torch.randn(20, 32, generator=torch.Generator().manual_seed(2)) / 50
    inputs = collected(model, [layer], tokens)[layer.name]
    beside = beside_experts(layer, Recipe(refit="least_squares"), inputs, torch.zeros(2, 32))
    assert beside.widths == (20, 2) and not beside.change.any()
    found = BesideExperts(beside.shared, (20, 2), torch.cat([change, torch.ones(2, 32)]))
    layer.experts.constant_outputs = type("Constants", (), {"vectors": torch.zeros(2, 32)})()
    left = write_beside(layer, found, torch.full((2, 32), 3.0, dtype=torch.float64))
    new = layer.shared.down.weight
    assert new.dtype == torch.bfloat16 and new.requires_grad
    assert torch.equal(new, (old.float() + change.T).to(torch.bfloat16)) and not torch.equal(new, old)
    assert torch.equal(left.change, (new.float() - old.float()).T) and left.widths == (20, 0)
    assert torch.equal(layer.experts.constant_outputs.vectors, torch.full((2, 32), 4.0))
