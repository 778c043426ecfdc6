"""Experts of other forms than dense: what they compute, their gradients, and what becomes of them."""

import copy
import pickle

import pytest
import torch
from form_models import (
    FORM_NAMES,
    FORMED,
    IDS,
    biases,
    change_layer,
    dense_weights,
    formed_model,
    layout_entry,
    logits,
    slow_output,
    split,
)
from tiny_models import tiny_model

from hf_mcsmoe.expert_values import PackedExperts
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling.densify import densify, densify_layer, harden
from hf_mcsmoe.modeling.experts import install_mapped
from hf_mcsmoe.modeling.forms import form_layers, low_rank_products, ragged, stack_products
from hf_mcsmoe.modeling.install_forms import install_low_rank_sparse, install_ragged

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def calls(layer, tokens=11):
    """Random hidden states, distinct slots and weights for a layer's experts, with a token that has a slot twice."""
    hidden = torch.randn(tokens, layer.hidden_size)
    gates, slots = torch.rand(tokens, layer.num_slots).topk(layer.top_k)
    slots[0] = 2  # dropped
    slots[1] = torch.tensor([0, 5])[: layer.top_k]  # one expert twice where 5 of 8 are stored
    return hidden, slots, gates


def set_implementation(model, name):
    if type(model.config).model_type != "switch_transformers":
        model.set_experts_implementation(name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("family", FORMED)
def test_the_slow_reference_is_what_experts_compute(family, form, implementation):
    for collapse in (False, True):
        model = tiny_model(family)
        set_implementation(model, implementation)
        layer = find_layers(model)[0]
        change_layer(layer, form, 5, torch.Generator().manual_seed(1), collapse_duplicates=collapse)
        hidden, slots, gates = calls(layer)
        output = layer.family.run_experts(layer, hidden, slots, gates)
        index = layer.experts.expert_map.index
        expected = slow_output(family, layer.experts.densify(), index, hidden, slots, gates)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert not output[0].any()


@pytest.mark.parametrize("function", ["stacked", "gathered"])
@pytest.mark.parametrize("form", FORM_NAMES)
def test_what_runs_on_gpus_is_what_runs_on_the_cpu(form, function):
    module = ragged if form == "ragged" else stack_products
    if not hasattr(module, function) or (form, function) == ("ranked_low_rank", "stacked"):
        return  # there is no grouped kernel for these
    for family in ("qwen3_moe", "gpt_oss", "nemotron_h"):
        layer = find_layers(tiny_model(family))[0]
        change_layer(layer, form, 5, torch.Generator().manual_seed(1))
        hidden, slots, gates = calls(layer)
        hidden.requires_grad_()
        experts, gates = layer.experts.expert_map(slots, gates, can_skip=True)
        assert (experts == 5).any()
        results = []
        for one in (module.eager, getattr(module, function)):
            output = one(layer.experts, hidden, experts, gates)
            grads = torch.autograd.grad(output.square().sum(), [hidden, *layer.experts.parameters()])
            results.append([output, *grads])
        for wanted, got in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_all_kept_rows_in_a_gpu_stack_are_not_copied():
    layer = find_layers(tiny_model("qwen3_moe"))[0]
    weights = dense_weights(layer, 8)
    factors = {n: [split(m, 8, torch.ones(len(m)) > 0) for m in t] for n, t in weights.tensors().items()}
    install_low_rank_sparse(layer, factors, {}, torch.arange(8), layout_entry(layer, 8))
    _, sparse = low_rank_products.filled_rows(layer.experts, "up")
    assert sparse.data_ptr() == layer.experts.up_sparse.data_ptr()


@pytest.mark.parametrize("family", FORMED)
def test_everything_kept_is_the_original_model(family):
    for form in ("ragged", "low_rank_sparse"):
        model = tiny_model(family)
        with torch.no_grad():
            expected = logits(model)
        for layer in find_layers(model):
            weights = dense_weights(layer, 8)
            entry = layout_entry(layer, 8, has_dropped=False)
            if form == "ragged":
                install_ragged(layer, PackedExperts.from_dense(weights), torch.arange(8), entry)
            else:
                matrices = {n: t for n, t in weights.tensors().items() if not n.endswith("bias")}
                factors = {n: [split(m, 4, torch.ones(len(m)) > 0) for m in t] for n, t in matrices.items()}
                install_low_rank_sparse(layer, factors, biases(weights), torch.arange(8), entry)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FORMED)
@pytest.mark.parametrize("form", FORM_NAMES)
def test_densified_is_the_same_function(family, form):
    model = formed_model(family, form)
    with torch.no_grad():
        expected = logits(model)
        densify(model)
        assert not form_layers(model)
        assert "LowRank" not in repr(model) and "Ragged" not in repr(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    widths = {entry.get("intermediate_size") for entry in model.config.merged_sparse_moe["layers"].values()}
    assert all(width is None or (width % 8 == 0 and form == "ragged") for width in widths)
    assert all("form" not in entry for entry in model.config.merged_sparse_moe["layers"].values())


def test_densify_names_the_layers_that_it_could_take():
    model = formed_model("qwen3_moe", "ragged")
    with pytest.raises(ValueError, match=r"'model.layers.7'.*model.layers.0.mlp.experts"):
        densify_layer(model, "model.layers.7")


def dense_of(experts):
    """The matrices of decomposed experts as a differentiable function of their parameters."""
    found = {}
    for matrix in ("gate", "up", "down"):
        left, right, sparse = (getattr(experts, f"{matrix}_{part}") for part in ("left", "right", "sparse"))
        offsets, rows = getattr(experts, f"{matrix}_row_offsets").tolist(), getattr(experts, f"{matrix}_rows")
        made = []
        for e in range(len(left)):
            part = slice(offsets[e], offsets[e + 1])
            placed = torch.zeros(left.shape[1], right.shape[2], dtype=left.dtype)
            made.append(left[e] @ right[e] + placed.index_put((rows[part],), sparse[part]))
        found[matrix] = torch.stack(made)
    return type("Weights", (), {**found, **{f"{m}_bias": None for m in found}, "num_experts": len(left)})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_through_dense_matrices(implementation):
    model = tiny_model("qwen3_moe").double()
    model.set_experts_implementation(implementation)
    layer = find_layers(model)[0]
    change_layer(layer, "low_rank_sparse", 5, torch.Generator().manual_seed(1))
    hidden, slots, gates = (t.double() if t.is_floating_point() else t for t in calls(layer))
    inputs = [hidden.requires_grad_(), gates.requires_grad_(), *layer.experts.parameters()]
    direction = torch.randn_like(hidden)
    output = layer.family.run_experts(layer, hidden, slots, gates)
    index = layer.experts.expert_map.index
    expected = slow_output("qwen3_moe", dense_of(layer.experts), index, hidden, slots, gates)
    for got, wanted in zip(
        torch.autograd.grad((output * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)
        assert got.any()


@pytest.mark.parametrize("form", FORM_NAMES)
def test_gradients_under_checkpointing_and_autocast(form):
    model = formed_model("qwen3_moe", form).train()
    logits(model).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if ".experts." in name}
    model.zero_grad()
    model.activation_checkpointing_enable()
    logits(model).square().mean().backward()
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            output = logits(model)
        output.float().square().mean().backward()
        torch.testing.assert_close(output.float(), logits(model), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORM_NAMES)
def test_half_precision_is_near_float32(form, dtype):
    for family in ("gpt_oss", "switch_transformers"):
        model = formed_model(family, form, dtype=dtype)
        with torch.no_grad():
            output = logits(model)
            assert output.dtype == dtype
            expected = logits(copy.deepcopy(model).float())
        # Of all logits together: rounding may send single tokens to another expert.
        assert (output.float() - expected).norm() < 0.1 * expected.norm()


def test_hardening_keeps_the_matrices_and_drops_rows_of_zeros():
    model = formed_model("gpt_oss", "low_rank_sparse")
    for experts in form_layers(model).values():
        for name, part in experts.sparse_parts().items():
            assert part.parameter is getattr(experts, name) and len(part.row) == len(part.expert_of_row)
            with torch.no_grad():
                part.parameter[part.row % 3 == 1] = 0
                part.parameter[part.row % 3 == 2, 1:] = 0  # stays
    with torch.no_grad():
        expected = logits(model)
        matrices = [experts.densify().tensors() for experts in form_layers(model).values()]
        sizes = [p.numel() for p in model.parameters()]
        harden(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    for experts, before in zip(form_layers(model).values(), matrices, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in experts.densify().tensors().items())
    assert sum(p.numel() for p in model.parameters()) < sum(sizes)
    for name, experts in form_layers(model).items():
        for part in experts.sparse_parts().values():
            assert sorted(set((part.row % 3).tolist())) == [0, 2]
        assert all(part.parameter.requires_grad for part in experts.sparse_parts().values())
        rows = model.config.merged_sparse_moe["layers"][name]["num_rows"]
        assert rows == {m: len(getattr(experts, f"{m}_sparse")) for m in ("gate", "up", "down")}


def test_sparse_parts_say_whose_rows_they_are():
    experts = next(iter(form_layers(formed_model("qwen3_moe", "low_rank_sparse")).values()))
    part = experts.sparse_parts()["down_sparse"]
    for expert, factor in enumerate(experts.factors("down")):
        mine = part.expert_of_row == expert
        assert torch.equal(part.row[mine], factor.rows) and torch.equal(part.parameter[mine], factor.sparse)
    assert not (part.expert_of_row == 0).any() and part.expert_of_row.max() == 4


@pytest.mark.parametrize("form", FORM_NAMES)
def test_copies_are_independent(form):
    model = formed_model("gpt_oss", form)
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)
        for experts in form_layers(copied).values():
            assert experts.expert_activation.args[0] is experts
            next(experts.parameters()).data.zero_()
        assert not torch.equal(logits(copied), expected)
        assert torch.equal(logits(model), expected)


def test_sizes_on_the_host_follow_their_buffer():
    experts = next(iter(form_layers(formed_model("qwen3_moe", "ragged")).values()))
    first = list(experts.host_integers("offsets"))
    experts.offsets[1] -= 1
    assert experts.host_integers("offsets")[1] == first[1] - 1
    experts.offsets = torch.arange(6)
    assert experts.host_integers("offsets") == [0, 1, 2, 3, 4, 5]


def test_errors_come_before_the_layer_changes():
    layer = find_layers(tiny_model("qwen3_moe"))[0]
    packed = PackedExperts.from_dense(dense_weights(layer, 8))
    with pytest.raises(ValueError, match="needs 5 experts"):
        install_ragged(layer, packed, torch.arange(8) % 5, layout_entry(layer, 5))
    factor = split(torch.randn(3, 5), 2, torch.zeros(3) > 0)
    with pytest.raises(ValueError, match="needs factors of"):
        install_low_rank_sparse(layer, {"up": [factor]}, {}, torch.arange(8), layout_entry(layer, 8))
    factors = {"gate": [factor] * 8, "up": [factor] * 8, "down": [factor] * 8}
    with pytest.raises(ValueError, match="shape"):
        install_low_rank_sparse(layer, factors, {}, torch.arange(8), layout_entry(layer, 8))
    assert hasattr(layer.experts, "gate_up_proj")


def test_an_implementation_that_forms_do_not_have_is_refused():
    model = formed_model("qwen3_moe", "ragged")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(ValueError, match=r"sonicmoe.*batched_mm.*set_experts_implementation"):
        logits(model, IDS)


def test_a_dense_layer_beside_formed_ones_is_as_before():
    model = tiny_model("qwen3_moe")
    first, second, *_ = find_layers(model)
    install_mapped(second, dict(second.expert_parameters), torch.arange(8), layout_entry(second, 8, has_dropped=False))
    expected = logits(model)
    install_ragged(
        first, PackedExperts.from_dense(dense_weights(first, 8)), torch.arange(8), layout_entry(first, 8, False)
    )
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_dense_experts_are_not_kept_alive(form):
    model = formed_model("gpt_oss", form, num_experts=3)
    for experts in form_layers(model).values():
        for name, tensor in experts.state_dict().items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
