"""Features of gated neurons and their sums, against loops over tokens and neurons in float64."""

import dataclasses

import pytest
import torch
from all_families import STANDARD, tiny
from all_families import logits as run_model
from fit_layers import (
    FORMATS,
    HIDDEN,
    activation,
    packed_experts,
    routed,
    slow_constants,
    slow_features,
    slow_outputs,
)
from tiny_models import tiny_model

from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layer.compression import as_float32
from hf_mcsmoe.layer.fit import routed_tokens, with_answers
from hf_mcsmoe.observation import gated_features, token_batches
from hf_mcsmoe.observation.gated_features import (
    apply_down,
    dense_gates,
    sum_expert_grams,
    sum_features,
    sum_input_grams,
)
from hf_mcsmoe.observation.kept_features import KeptFeatures
from hf_mcsmoe.observation.layer_inputs import LayerInputs, ignore_passive
from hf_mcsmoe.observation.token_batches import RoutedTokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WIDTHS = (4, 0, 3, 5, 2)  # rank != id: expert 0 is the most used, not the widest; expert 1 has no neurons


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def experts(request):
    return packed_experts(request.param, WIDTHS)


def ragged_batches(dtype=torch.float32):
    """Batches of 7, 1 and 12 tokens; no token of the first two goes to expert 4."""
    batches = [routed(n, len(WIDTHS), seed=n, dtype=dtype) for n in (7, 1, 12)]
    for batch in batches[:2]:
        batch.gates[:, 4] = 0
    assert batches[2].gates[:, 4].any()
    return batches


def joined(batches):
    fields = ("hidden_states", "gates", "targets")
    return RoutedTokens(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in fields})


def assert_sums(sums, experts, whole):
    phi, target = slow_features(experts, whole), whole.targets.double() - slow_constants(experts, whole)
    torch.testing.assert_close(sums.gram, phi.T @ phi, **CLOSE)
    torch.testing.assert_close(sums.cross, phi.T @ target, **CLOSE)
    assert sums.energy == pytest.approx(target.square().sum().item(), rel=1e-5)
    assert sums.num_tokens == len(target)
    assert sums.gram.dtype == sums.cross.dtype == torch.float64


@pytest.mark.parametrize("chunk", [8192, 12, 5, 1])
def test_sums_are_those_of_the_slow_features(experts, chunk, monkeypatch):
    monkeypatch.setattr(token_batches, "CHUNK_TOKENS", chunk)
    batches = ragged_batches()
    sums = sum_features(experts, activation, batches)
    assert_sums(sums, experts, joined(batches))
    assert torch.equal(sums.gram, sums.gram.T)


def test_sums_of_narrow_tokens_are_computed_in_float32(experts):
    batches = ragged_batches(torch.bfloat16)
    assert_sums(sum_features(experts, activation, batches), experts, joined(batches))


def test_weights_of_experts_may_be_narrow():
    experts = packed_experts(FORMATS["gated-bias"], WIDTHS, dtype=torch.bfloat16)
    batches = ragged_batches()
    assert_sums(sum_features(experts, activation, batches), experts, joined(batches))


@pytest.mark.parametrize("chunk", [8192, 3])
def test_grams_of_experts_are_the_diagonal_blocks(experts, chunk, monkeypatch):
    monkeypatch.setattr(token_batches, "CHUNK_TOKENS", chunk)
    batches = ragged_batches()
    phi = slow_features(experts, joined(batches))
    grams = sum_expert_grams(experts, activation, batches)
    offsets = experts.offsets.tolist()
    assert [len(gram) for gram in grams] == list(WIDTHS)
    for expert, gram in enumerate(grams):
        mine = phi[:, offsets[expert] : offsets[expert + 1]]
        torch.testing.assert_close(gram, mine.T @ mine, **CLOSE)


@pytest.mark.parametrize("chunk", [8192, 3])
def test_input_grams_count_each_token_of_an_expert_once_without_its_gate(experts, chunk, monkeypatch):
    monkeypatch.setattr(token_batches, "CHUNK_TOKENS", chunk)
    batches = ragged_batches()
    whole, offsets = joined(batches), experts.offsets.tolist()
    phi = slow_features(experts, RoutedTokens(whole.hidden_states, (whole.gates != 0).float(), whole.targets))
    grams = sum_input_grams(experts, activation, batches)
    assert set(grams) == ({"up", "down"} if experts.gate is None else {"gate", "up", "down"})
    for expert in range(experts.num_experts):
        inputs = whole.hidden_states[whole.gates[:, expert] != 0].double()
        hidden = phi[:, offsets[expert] : offsets[expert + 1]]
        for name in set(grams) - {"down"}:
            torch.testing.assert_close(grams[name][expert], inputs.T @ inputs, **CLOSE)
        torch.testing.assert_close(grams["down"][expert], hidden.T @ hidden, **CLOSE)


def test_the_error_of_sums_is_the_residual(experts):
    batches = ragged_batches()
    whole = joined(batches)
    sums = sum_features(experts, activation, batches)
    kept = torch.tensor([0, 3, 4, 8, 12, 13])
    down = torch.randn(6, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    residual = whole.targets.double() - slow_constants(experts, whole) - slow_features(experts, whole)[:, kept] @ down
    assert sums.error(down, kept) == pytest.approx(residual.square().sum().item(), rel=1e-5)


def test_outputs_are_those_of_the_slow_features(experts):
    whole = joined(ragged_batches())
    torch.testing.assert_close(apply_down(experts, activation, whole).double(), slow_outputs(experts, whole), **CLOSE)


def test_nothing_is_summed_without_tokens_or_for_experts_that_none_reaches(experts):
    empty = sum_features(experts, activation, [])
    assert not empty.gram.any() and not empty.cross.any() and empty.energy == empty.num_tokens == 0
    unrouted = RoutedTokens(torch.randn(3, HIDDEN), torch.zeros(3, len(WIDTHS)), torch.ones(3, HIDDEN))
    sums = sum_features(experts, activation, [unrouted])
    assert not sums.gram.any() and sums.energy == pytest.approx(3 * HIDDEN)
    assert not any(gram.any() for gram in sum_expert_grams(experts, activation, [unrouted]))
    assert not apply_down(experts, activation, unrouted).any()


def test_long_batches_are_cut_and_short_ones_joined(monkeypatch):
    monkeypatch.setattr(token_batches, "CHUNK_TOKENS", 5)
    batches = [routed(n, 3, seed=n) for n in (2, 2, 2, 11, 1, 4, 1)]
    more = [
        {"dropped_gates": torch.rand(len(batch.gates), 2), "scale": torch.rand(len(batch.gates))} for batch in batches
    ]
    batches = [dataclasses.replace(batch, **fields) for batch, fields in zip(batches, more, strict=True)]
    pieces = list(token_batches.in_chunks(batches))
    assert [len(piece.gates) for piece in pieces] == [4, 2, 5, 5, 2, 5]
    for field in dataclasses.fields(RoutedTokens):
        whole = torch.cat([getattr(piece, field.name) for piece in pieces])
        assert torch.equal(whole, torch.cat([getattr(batch, field.name) for batch in batches]))
    assert list(token_batches.in_chunks([])) == []


def test_gates_add_up_slots_of_one_expert_and_leave_out_what_is_none():
    index = torch.tensor([[2, 2, 0], [-1, 1, 3], [3, -1, -1], [0, 1, 2]])
    weights = torch.tensor([[0.5, 0.25, 0.1], [0.7, 0.2, 0.4], [1.0, 1.0, 1.0], [0.0, 0.3, -0.1]])
    expected = torch.tensor([[0.1, 0.0, 0.75], [0.0, 0.2, 0.0], [0.0, 0.0, 0.0], [0.0, 0.3, -0.1]])
    torch.testing.assert_close(dense_gates(index, weights, 3), expected)
    narrow = dense_gates(index, weights.bfloat16(), 3)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, expected, rtol=1e-2, atol=0)


def test_slots_of_weight_zero_give_no_features():
    experts = packed_experts(FORMATS["gated-bias"], WIDTHS)
    index, weights = torch.tensor([[0, 3], [3, 2]]), torch.tensor([[0.6, 0.0], [0.0, 0.8]])
    batch = RoutedTokens(torch.randn(2, HIDDEN), dense_gates(index, weights, len(WIDTHS)), torch.zeros(2, HIDDEN))
    found = gated_features.features_of_experts(experts, activation, batch.hidden_states, batch.gates)
    assert [tokens.tolist() for tokens, _ in found] == [[0], [], [1], [], []]


# --- what the modules of real models compute


def assert_modules_agree(model, called):
    """`with_answers` gives for every layer that can be fitted what its experts module gives in a forward."""
    layers = [
        layer
        for layer in find_layers(model)
        if not layer.family.no_forms_because(layer) and not getattr(layer.experts, "has_post_expert_norm", False)
    ]
    seen = {}

    def keep(layer):
        def hook(module, args, kwargs):  # noqa: ARG001
            states, index, weights = layer.family.routed_inputs(args, kwargs)
            seen[layer.name] = (states, *ignore_passive(index, weights, layer.num_slots))

        return hook

    handles = [x.experts.register_forward_pre_hook(keep(x), with_kwargs=True) for x in layers]
    with torch.no_grad():
        called()
    for handle in handles:
        handle.remove()
    assert layers == [] or seen
    for layer in layers:
        if layer.name not in seen or layer.num_identity_slots:
            continue
        family = layer.family
        stacked = family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
        experts = as_float32(family.view(layer, stacked))
        inputs = LayerInputs([seen[layer.name]])
        batches = routed_tokens(layer, inputs, torch.eye(layer.num_slots), [None], reroute=False)
        output = with_answers(KeptFeatures(experts, family.activation(layer), batches))[0].targets
        with torch.no_grad():
            expected = family.run_experts(layer, *seen[layer.name]).float().reshape(output.shape)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert expected.any()
    return len(layers)


EVERY_RUN = ("qwen3_moe", "gpt_oss", "switch_transformers", "deepseek_v3", "llama4", "nemotron_h", "mixtral", "jamba")


@pytest.mark.parametrize(
    "key", [key if key in EVERY_RUN else pytest.param(key, marks=pytest.mark.slow) for key in STANDARD]
)
def test_features_times_down_are_what_the_experts_of_every_family_give(key):
    ids = torch.randint(3, 130, (2, 9), generator=torch.Generator().manual_seed(0))
    model = tiny(key)
    assert_modules_agree(model, lambda: run_model(model, ids))


def test_features_times_down_are_what_experts_as_modules_give():
    ids = torch.randint(3, 130, (2, 9), generator=torch.Generator().manual_seed(0))
    model = tiny_model("switch_transformers")
    assert assert_modules_agree(model, lambda: model(input_ids=ids, decoder_input_ids=ids)) == 4
