"""Mapped results as plain models: what stays bit for bit, what the native layout would have made, what is refused."""

import json
import re
import shutil

import pytest
import torch
from checkpoints import same_tensors, tensors
from tiny_models import CAUSAL_FAMILIES, in_every_run, tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hf_mcsmoe import densify
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.grouping import GROUPING
from hf_mcsmoe.loading import load_model
from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.modeling.mapped_to_native import resize
from hf_mcsmoe.publishing import read_report
from hf_mcsmoe.routing.treatments import TREATMENTS
from hf_mcsmoe.types import ExpertWeights

GROUPED = ("deepseek_v3", "glm4_moe", "nemotron_h")  # their routers choose within groups
UNGROUPED = tuple(name for name in CAUSAL_FAMILIES if name not in GROUPED)
UNIFORM = {"keep": 0.5, "allocation": "uniform"}
DROP = {"similarity": None, "grouping": "drop", "alignment": None, "merging": None}
RAGGED = {"keep": 0.2, "selection": "gated_obs", "refit": "least_squares"}
DECOMPOSED = {"decomposition": "low_rank_sparse", "decomposition_options": {"rank": 4, "keep_rows": 0.2}}


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def load_plain(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__module__.startswith("transformers.") and not hasattr(model.config, "merged_sparse_moe")
    return model


def test_where_all_experts_stay_it_is_the_original(family, write_compressed, export, original, prompt, tmp_path):
    model = original(family)
    expected = logits(model, prompt)
    model.save_pretrained(tmp_path / "original")
    folder, report = export(write_compressed(model, keep=1.0))
    assert same_tensors(folder, tmp_path / "original")
    assert torch.equal(logits(load_plain(folder), prompt), expected)
    assert report["export"]["is_router_cut"] is False and report["export"]["router_treatment"] is None


@pytest.mark.parametrize("model_type", in_every_run(UNGROUPED))
def test_cut_routers_give_what_the_native_layout_gives(model_type, write_compressed, export):
    native = write_compressed(model_type, "native", keep=0.5, layout="native")
    folder, report = export(write_compressed(model_type, **UNIFORM))
    assert same_tensors(folder, native)
    assert json.loads((folder / "config.json").read_text()) == json.loads((native / "config.json").read_text())
    assert report["export"]["is_router_cut"] and report["export"]["num_experts"] == 4


@pytest.fixture
def within_groups():
    """A grouping that, in the mapped layout too, keeps as many experts in each of 2 groups of slots."""

    @GROUPING.register("within_groups")
    def group(saliency, similarity, num_experts, partitions):  # noqa: ARG001
        return GROUPING["dominant_experts"](saliency, similarity, num_experts, 2)

    yield "within_groups"
    del GROUPING._entries["within_groups"]


@pytest.mark.parametrize("model_type", in_every_run(GROUPED))
def test_group_limited_routers_are_cut_group_by_group(model_type, write_compressed, export, within_groups):
    native = write_compressed(model_type, "native", keep=0.5, layout="native")
    folder, _ = export(write_compressed(model_type, grouping=within_groups, **UNIFORM))
    assert same_tensors(folder, native)


def test_dropped_slots_leave_the_router(write_compressed, export):
    native = write_compressed("qwen3_moe", "native", keep=0.5, layout="native", **DROP)
    folder, report = export(write_compressed("qwen3_moe", **UNIFORM, **DROP))
    assert same_tensors(folder, native)
    assert any("dropped experts added nothing" in line for line in report["export"]["changes"])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_narrow_experts_are_filled_with_zeros_to_one_width(model_type, write_compressed, export, prompt):
    mapped = write_compressed(model_type, **RAGGED)
    model = load_model(mapped)
    packed = {name: form.packed() for name, form in form_layers(model).items()}
    widest = max(int(one.widths.max()) for one in packed.values())
    folder, report = export(mapped)
    plain = load_plain(folder)
    width = report["export"]["intermediate_size"]
    layers = find_layers(plain)
    assert len(packed) == len(layers) and width % 8 == 0 and 0 <= width - widest < 8
    assert width < find_layers(tiny_model(model_type))[0].intermediate_size
    for layer in layers:
        weights = layer.family.view(layer, layer.expert_parameters)
        expected = packed[layer.name].to_uniform(width)
        for name, tensor in expected.tensors().items():
            assert torch.equal(getattr(weights, name), tensor), name
    assert_close(logits(plain, prompt), logits(model, prompt), rtol=1e-5, atol=1e-5)
    assert any(f"zeros, which add nothing to any output, to {width}" in line for line in report["export"]["changes"])
    assert all(entry["widths"] == [width] * 8 for entry in report["layers"])


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_decomposed_experts_are_multiplied_out(model_type, write_compressed, export, prompt):
    mapped = write_compressed(model_type, keep=1.0, **DECOMPOSED)
    folder, report = export(mapped)
    model = load_model(mapped)
    expected = logits(model, prompt)
    densify(model)
    plain = load_plain(folder)
    assert torch.equal(logits(plain, prompt), logits(model, prompt))
    assert_close(logits(plain, prompt), expected, rtol=1e-4, atol=1e-5)
    assert any("multiplied out" in line for line in report["export"]["changes"])
    assert report["total_parameters_after"] == sum(p.numel() for p in plain.parameters())


def test_decomposed_and_merged_in_one(write_compressed, export):
    mapped = write_compressed("mixtral", **UNIFORM, **DECOMPOSED)
    folder, _ = export(mapped)
    model = load_model(mapped)
    densify(model)
    stored = {layer.name: layer for layer in find_layers(model)}
    for layer in find_layers(load_plain(folder)):
        assert layer.num_experts == 4
        for name, parameter in layer.expert_parameters.items():
            assert torch.equal(parameter, stored[layer.name].expert_parameters[name])


def test_a_dense_narrow_result_loses_its_zeros_and_nothing_else(write_compressed, export, prompt, tmp_path):
    mapped = write_compressed("qwen3_moe", **RAGGED)
    model = load_model(mapped)
    densify(model)
    model.save_pretrained(tmp_path / "dense")
    for name in ("compression_report.json", "README.md", "recipe.yaml"):
        shutil.copy(mapped / name, tmp_path / "dense" / name)
    folder, _ = export(tmp_path / "dense")
    assert torch.equal(logits(load_plain(folder), prompt), logits(model, prompt))


def test_other_widths_add_and_take_zeros_only():
    generator = torch.Generator().manual_seed(0)
    up, gate, down = (torch.randn(s, generator=generator) for s in ((2, 3, 4), (2, 3, 4), (2, 4, 3)))
    bias = torch.randn(2, 3, generator=generator)
    weights = ExpertWeights(up=up, gate=gate, down=down, up_bias=bias, gate_bias=bias, down_bias=torch.ones(2, 4))
    wide = resize(weights, 5)
    assert wide.up.shape == wide.gate.shape == (2, 5, 4) and wide.down.shape == (2, 4, 5)
    assert not wide.up[:, 3:].any() and not wide.down[:, :, 3:].any() and not wide.up_bias[:, 3:].any()
    for name, tensor in resize(wide, 3).tensors().items():
        assert torch.equal(tensor, getattr(weights, name))
    with pytest.raises(ValueError, match=r"width is 2, but the experts have 3 neurons. Use at least that"):
        resize(weights, 2)


def test_the_dtype_of_the_checkpoint_stays(write_compressed, export):
    folder, _ = export(write_compressed(tiny_model("qwen3_moe").to(torch.bfloat16), **UNIFORM))
    assert {tensor.dtype for tensor in tensors(folder).values()} == {torch.bfloat16}
    assert load_model(folder).dtype == torch.bfloat16


@pytest.fixture
def treatment():
    """`treatment(function)`: its name as a router treatment for this test."""
    names = []

    def add(function):
        TREATMENTS.register("of_the_test")(function)
        names.append("of_the_test")
        return names[-1]

    yield add
    for name in names:
        del TREATMENTS._entries[name]


def test_another_treatment_of_the_routers_is_a_function(write_compressed, export, treatment):
    mapped = write_compressed("gpt_oss", **UNIFORM)
    seen = []

    def mean_row(name, tensor, groups, usage_frequency, *, scale=1.0):
        seen.append((name, groups, usage_frequency))
        return torch.stack([tensor[groups.members(g)].float().mean(0) * scale for g in range(groups.num_groups)])

    folder, report = export(mapped, router=treatment(mean_row), router_options={"scale": 2.0})
    assert report["export"]["router_treatment"] == "of_the_test"
    assert {name for name, _, _ in seen} == {"weight", "bias"} and len(seen) == 6
    old, new = tensors(mapped), tensors(folder)
    entries = {entry["layer"]: entry for entry in read_report(mapped)["layers"]}
    for layer, entry in entries.items():
        router = layer.replace("experts", "router")
        group_of_expert = torch.tensor(entry["group_of_expert"])
        for name in ("weight", "bias"):
            expected = [old[f"{router}.{name}"][group_of_expert == g].mean(0) * 2 for g in range(4)]
            assert_close(new[f"{router}.{name}"], torch.stack(expected), rtol=1e-6, atol=1e-7)
    usage = [usage for name, _, usage in seen if name == "weight"]
    assert [one.tolist() for one in usage] == [entry["usage_frequency"] for entry in entries.values()]


@pytest.mark.parametrize("wrong", [lambda t: t[:3], lambda t: t[:4].double()])
def test_a_treatment_that_makes_something_else_is_refused(wrong, write_compressed, export, treatment, tmp_path):
    mapped = write_compressed("qwen3_moe", **UNIFORM)
    name = treatment(lambda name, tensor, groups, usage_frequency: wrong(tensor))  # noqa: ARG005
    with pytest.raises(ValueError, match=r"'of_the_test' made .* of 'weight', expected torch.float32 \(4, 32\)"):
        export(mapped, router=name)
    assert not (tmp_path / "exported").exists()


def test_docs_of_the_treatments_tell_the_signature():
    import hf_mcsmoe.routing.treatments as package

    assert re.search(r"name: str, tensor: Tensor, groups: ExpertGroups, usage_frequency: Tensor", package.__doc__)
    assert TREATMENTS.options("dominant_rows") == {}
