"""What must hold for every preset, whatever its steps: identities that need no reference implementation."""

import copy

import pytest
import torch
from test_contract import logits, plant_features, relabel_experts, shuffle_neurons, steer, usage
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hf_mcsmoe import load_calibration, plan
from hf_mcsmoe.auto_candidates import AUTO
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.merging import MERGING
from hf_mcsmoe.presets import PRESETS
from hf_mcsmoe.recipe_reading import recipe_from_preset

LOOSE = {"rtol": 1e-3, "atol": 1e-3}
# "auto" takes one of the others. Its choice has tests of its own.
METHODS = sorted(PRESETS.keys() - {AUTO})


def recipes_of_operators():
    """M-SMoE with each merging operator that no preset has, by a name of ours: operators are held to all this too."""
    used = {recipe_from_preset(name).merging for name in PRESETS}
    return {f"m-smoe with {name}": {"preset": "m-smoe", "merging": name} for name in MERGING if name not in used}


OPERATORS = recipes_of_operators()
METHODS += OPERATORS
# Each model as (model type, what it has other than the tiny models): top-2 of 8 experts, and top-4 of 16.
MODELS = {
    "8 experts, top-2": ("mixtral", {}),
    "16 experts, top-4": ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4}),
}
# Why a preset does not have an identity. A new preset has all of them unless it says here why not.
NOT_EXACT_AT_ALL = {"mc-smoe": "it decomposes what it keeps"}
UNALIGNED = "it averages neurons where they stand, as published"
NOT_FREE_OF_NEURON_ORDER = {"hc-smoe": UNALIGNED, "merge-moe": UNALIGNED, "sub-moe": UNALIGNED}
NOT_FREE_OF_LABELS = {"sub-moe": "K-means draws its starts by place", "random": "it draws a number for each label"}
# Options under which a preset fits these models and does not take long.
SMALLER = {name: {"matching_options": {"steps": 8}} for name in METHODS if name.endswith("-matched")}
# With its own 0.05 two neurons of one of these models cost the same up to rounding where one goes and one stays.
SMALLER["m-smoe-union"] = {"selection_options": {"block": 0.1}}
SMALLER["mc-smoe"] = {"decomposition_options": {"rank": 8, "keep_rows": 0.1}}


def changes_of(method):
    """The preset and what is changed of it, for `recipe_from_preset`."""
    return {**OPERATORS.get(method, {"preset": method}), **SMALLER.get(method, {})}


def solves(name):
    """Whether a preset solves systems with what layers were given, or ranks neurons, or reads gradients.

    A bfloat16 model gives layers other numbers. And of factors only the product is the same whatever the rounding.
    """
    recipe = recipe_from_preset(**changes_of(name))
    reads_numbers = recipe.selection is not None or bool(recipe.statistics_with("gradients"))
    factors = recipe.decomposition is not None or recipe.shared_base is not None
    return recipe.needs_inputs or factors or reads_numbers


def choices(model):
    """What routers and grouping chose."""
    return [(layer.usage_frequency, layer.group_of_expert) for layer in model.compression_report.layers]


def slowly(values, quick):
    """Those that are not in `quick` only in the slow runs."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


# One of each kind in every run. That a preset gives a result that loads is tested of all in every run.
QUICK = {"m-smoe", "mc-smoe", "reap", "hc-smoe", "mone", "narrow-obs", "resmoe", "heapr"}


@pytest.fixture(params=slowly(MODELS, list(MODELS)[:1]))
def model_of(request, original):
    """`model_of()`: a copy of one of the models."""
    model_type, changes = MODELS[request.param]
    return lambda: original(model_type, **changes)


@pytest.fixture
def run(compress):
    """`run(model, preset, calibration)`: compress with a preset, made faster where it takes long."""

    def run(model, method, *data, **changes):
        return compress(model, *data, **{**changes_of(method), **changes})

    return run


@pytest.mark.parametrize("preset", slowly([name for name in METHODS if name not in NOT_EXACT_AT_ALL], QUICK))
def test_keeping_everything_is_bit_identical(preset, model_of, run, prompt):
    assert torch.equal(logits(run(model_of(), preset, keep=1.0), prompt), logits(model_of(), prompt))


@pytest.mark.parametrize("preset", METHODS)
def test_the_result_is_as_small_as_planned_and_loads_again(preset, model_of, run, prompt, tmp_path):
    result = run(model_of(), preset)
    report = result.compression_report
    planned = plan(model_of(), recipe_from_preset(**changes_of(preset)))
    assert report.total_parameters_after == planned.total_parameters_after
    assert report.total_bytes_after == sum(p.numel() * p.element_size() for p in result.parameters())
    assert report.total_bytes_after < report.total_bytes_before
    result.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded, prompt), logits(result, prompt))
    assert torch.isfinite(logits(result, prompt)).all()


@pytest.mark.parametrize("preset", slowly([name for name in METHODS if name not in NOT_FREE_OF_NEURON_ORDER], QUICK))
def test_neuron_order_of_the_input_does_not_matter(preset, model_of, run, prompt):
    result, shuffled = run(model_of(), preset), run(shuffle_neurons(model_of()), preset)
    assert_close(logits(shuffled, prompt), logits(result, prompt), **LOOSE)


@pytest.mark.parametrize("preset", slowly([name for name in METHODS if name not in NOT_FREE_OF_LABELS], QUICK))
def test_relabelling_experts_commutes(preset, model_of, run, prompt):
    model = model_of()
    num_experts = find_layers(model)[0].num_experts
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(5)).tolist()
    relabelled = run(relabel_experts(model_of(), order), preset)
    assert_close(logits(relabelled, prompt), logits(run(model, preset), prompt), **LOOSE)


@pytest.mark.parametrize("preset", slowly(METHODS, QUICK))
def test_padding_and_batching_do_not_count(preset, model_of, run, tokens, prompt):
    rows = [row[: 5 + place % 16].tolist() for place, row in enumerate(tokens)]
    padded = torch.tensor([[0] * (24 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (24 - len(row)) + [1] * len(row) for row in rows])
    alone = load_calibration(rows, batch_size=1, held_out_fraction=0)
    together = load_calibration({"input_ids": padded, "attention_mask": mask}, batch_size=24, held_out_fraction=0)
    results = [run(model_of(), preset, data) for data in (alone, together)]
    assert usage(results[0]) == usage(results[1])
    assert_close(*(logits(result, prompt) for result in results), **LOOSE)


@pytest.mark.parametrize("preset", slowly(METHODS, QUICK))
@pytest.mark.parametrize("case", ["one token", "one pair of experts", "an expert that is never used"])
def test_hardly_any_routing_still_gives_a_finite_model(case, preset, model_of, run, tokens, prompt):
    model = plant_features(model_of())
    layers = find_layers(model)
    top_k = layers[0].top_k
    if case == "one pair of experts":
        for layer in layers:
            steer(layer, list(range(5 - top_k, 5)), 8.0)
    elif case == "an expert that is never used":
        for layer in layers:
            steer(layer, [3], -8.0)
    data = tokens[:1, :1] if case == "one token" else tokens
    result = run(model, preset, data)
    assert torch.isfinite(logits(result, prompt)).all()
    assert all(torch.isfinite(tensor).all() for tensor in result.state_dict().values())


@pytest.mark.parametrize("preset", slowly([name for name in METHODS if not solves(name)], QUICK))
def test_bfloat16_is_the_float32_result_but_for_rounding(preset, model_of, run, tokens):
    # Few tokens, and the first row for which rounding in the forward changes no choice.
    for row in tokens:
        narrow = model_of().to(torch.bfloat16)
        wide = copy.deepcopy(narrow).float()
        narrow, wide = (run(model, preset, row[None, :4]) for model in (narrow, wide))
        if choices(narrow) == choices(wide):
            break
    assert choices(narrow) == choices(wide)
    for (name, tensor), other in zip(narrow.state_dict().items(), wide.state_dict().values(), strict=True):
        if tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16 and other.dtype == torch.float32
            assert_close(tensor.float(), other, rtol=2**-6, atol=2**-8, msg=lambda m, name=name: f"{name}: {m}")
