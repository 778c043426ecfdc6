"""Selection and refit of whole models: what the result is, what it loses, and what is refused."""

import copy
import re

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from checkpoints import same_tensors, texts
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.executors import kept_inputs
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layer.fit import LEAST_SHARE
from hf_mcsmoe.outcome import count
from hf_mcsmoe.planning import plan

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "gemma4_text", "switch_transformers")
FIT = {"selection": "gated_obs", "refit": "least_squares"}
DROP = {"similarity": None, "grouping": "drop", "alignment": None, "merging": None}
RECIPES = {
    "mapped-neurons": {"layout": "mapped", "keep": 0.5, **FIT},
    "mapped-neurons-energy": {"layout": "mapped", "keep": 0.3, **FIT, "selection": "gated_energy"},
    "mapped-experts-and-neurons": {"layout": "mapped", "keep": 0.4, "keep_experts": 0.75, **FIT, **DROP},
    "mapped-merged-refit": {"layout": "mapped", "refit": "least_squares"},
    "mapped-union": {"layout": "mapped", "merging": "union", **FIT},
    "native-neurons": {"layout": "native", "keep": 0.4, **FIT},
    "native-experts-and-neurons": {"layout": "native", "keep": 0.4, "keep_experts": 0.75, **FIT, **DROP},
    "native-dropped-refit": {"layout": "native", "refit": "least_squares", **DROP},
    "native-union": {"layout": "native", "merging": "union", **FIT, "selection": "joint_obs"},
}
EVERY_RUN = ("qwen3_moe", "gpt_oss", "switch_transformers")
NARROWED = [name for name in RECIPES if name.startswith("native") and "neurons" in name]
SAME_FIELD_ELSEWHERE = ("deepseek_v3", "switch_transformers")  # dense layers or shared experts are as wide


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of token ids (B, S), for causal and sequence to sequence models."""
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **inputs).logits


def fit(model, tokens, **recipe):
    return compress_moe(model, Recipe(**recipe), calibration=tokens, progress=False)


def reports(model):
    return model.compression_report.layers


def mostly_slow(names):
    """Families of every kind in every run; the others in slow runs only."""
    return [name if name in EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in names]


def cases(skipped=SAME_FIELD_ELSEWHERE):
    few = ("mapped-neurons", "mapped-merged-refit", "native-experts-and-neurons", "mapped-union", "native-union")
    return [
        (f, r)
        for f in FAMILIES
        for r in (RECIPES if f == "qwen3_moe" else few)
        if not (f in skipped and r in NARROWED)
    ]


# --- what the result is


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "name"), cases())
def test_report_plan_and_checkpoint_agree_and_it_loads_again(model_type, name, original, tokens, prompt, tmp_path):
    recipe, before = RECIPES[name], original(model_type)
    planned = plan(before, Recipe(**recipe))
    result = fit(original(model_type), tokens, **recipe)
    report = result.compression_report
    assert count(result) == (report.total_parameters_after, report.total_bytes_after)
    if Recipe(**recipe).allocation == "uniform":
        assert report.total_parameters_after == planned.total_parameters_after
        assert report.total_parameters_before == planned.total_parameters_before == count(before)[0]
        per_layer = [x.expert_parameters_after for x in planned.layers]
        assert [x.parameters_after for x in report.layers] == per_layer
        assert [x.bytes_after for x in report.layers] == [x.expert_bytes_after for x in planned.layers]
    for entry in report.layers:
        assert sum(p.numel() for p in result.get_submodule(entry.layer).parameters()) == entry.parameters_after
        assert len(entry.widths) == entry.num_experts_after
        assert entry.relative_error is not None and entry.refit_error_before is not None
    result.save_pretrained(tmp_path)
    bytes_of_state = {k: t.numel() * t.element_size() for k, t in result.state_dict().items()}
    if Recipe(**recipe).allocation == "uniform":
        ignored = set(result._keys_to_ignore_on_save or ()) | set(result.all_tied_weights_keys or ())
        assert sum(v for k, v in bytes_of_state.items() if k not in ignored) == planned.total_bytes_after
    auto = AutoModelForCausalLM if model_type != "switch_transformers" else None
    if auto is not None:
        again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(logits(again, prompt), logits(result, prompt))


@pytest.mark.parametrize("layout", ["mapped", "native"])
@pytest.mark.parametrize("model_type", mostly_slow([*FAMILIES, "glm4_moe", "granitemoe"]))
def test_keeping_everything_is_bit_identical(model_type, layout, original, tokens, prompt):
    expected = logits(original(model_type), prompt)
    result = fit(original(model_type), tokens, layout=layout, keep=1.0, **FIT)
    assert torch.equal(logits(result, prompt), expected)
    for entry in reports(result):
        assert entry.relative_error == 0 and entry.parameters_after == entry.parameters_before


# --- what it loses


def double_neurons(model):
    """Give the first half of every expert's neurons twins, which share the work; what it computes is new."""
    with torch.no_grad():
        for layer in find_layers(model):
            family = layer.family
            stacked = family.stack(layer, dict(layer.expert_parameters))
            weights = family.view(layer, stacked)
            half = weights.width // 2
            for name, tensor in weights.tensors().items():
                if name == "down":
                    tensor[..., half:] = 0.25 * tensor[..., :half]
                    tensor[..., :half] *= 0.75
                elif name != "down_bias":
                    tensor[:, half:] = tensor[:, :half]
            for name, tensor in family.unstack(layer, stacked).items():
                layer.experts.get_parameter(name).data.copy_(tensor)
    return model


@pytest.mark.parametrize("layout", ["mapped", "native"])
@pytest.mark.parametrize("model_type", mostly_slow(FAMILIES))
def test_half_of_neurons_that_are_there_twice_go_without_loss(model_type, layout, original):
    if layout == "native" and model_type in SAME_FIELD_ELSEWHERE:
        pytest.skip("refused")
    changes = {} if model_type == "switch_transformers" else {"moe_intermediate_size": 32, "intermediate_size": 32}
    model = double_neurons(original(model_type, **changes))
    width = find_layers(model)[0].intermediate_size
    many = torch.randint(3, 150, (120, 20), generator=torch.Generator().manual_seed(3))
    expected = logits(model, many[:4])
    options = {"selection_options": {"ridge": 1e-7, "block": 1e-9}, "refit_options": {"ridges": (1e-7, 1e-6)}}
    result = fit(model, many, keep=0.5, layout=layout, **FIT, **options)
    for entry in reports(result):
        assert sum(entry.widths) == entry.num_slots * width // 2
        assert entry.relative_error < 1e-4
    assert_close(logits(result, many[:4]), expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "mapped-neurons-energy"),
        ("qwen3_moe", "native-experts-and-neurons"),
        ("gpt_oss", "native-neurons"),
        ("gpt_oss", "mapped-merged-refit"),
        ("nemotron_h", "mapped-experts-and-neurons"),
        ("nemotron_h", "native-dropped-refit"),
    ],
)
def test_the_refit_never_makes_a_layer_worse_and_mostly_better(model_type, name, original):
    many = torch.randint(3, 150, (100, 20), generator=torch.Generator().manual_seed(3))
    model = original(model_type)
    with_refit = fit(copy.deepcopy(model), many, **RECIPES[name])
    without = fit(copy.deepcopy(model), many, **{**RECIPES[name], "refit": None})
    for fitted, plain in zip(reports(with_refit), reports(without), strict=True):
        assert fitted.widths == plain.widths and fitted.group_of_expert == plain.group_of_expert
        assert fitted.relative_error <= plain.relative_error * (1 + 1e-4)
        assert plain.refit_error_before is None
        if model_type != "gpt_oss":  # its energy counts the constants of biases, too
            assert fitted.relative_error == pytest.approx(
                min(fitted.refit_error_before, fitted.refit_error_after), rel=1e-2
            )
    total = [sum(x.relative_error for x in reports(model)) for model in (with_refit, without)]
    assert total[0] < total[1]


@pytest.mark.parametrize("num_rows", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RECIPES)
def test_few_tokens_do_no_harm(name, num_rows, original, tokens, prompt):
    few = tokens[:num_rows, :8]
    result, plain = (fit(original("qwen3_moe"), few, **{**RECIPES[name], **c}) for c in ({}, {"refit": None}))
    assert logits(result, prompt).isfinite().all()
    for fitted, without in zip(reports(result), reports(plain), strict=True):
        if fitted.relative_error is not None:
            assert fitted.relative_error <= without.relative_error * (1 + 1e-4)


def test_experts_that_calibration_never_reached_keep_neurons(original, tokens, prompt):
    model = original("qwen3_moe")
    with torch.no_grad():
        for layer in find_layers(model):
            layer.router.weight[3] = 0
    result = fit(model, tokens[:2, :4], keep=0.5, **FIT)
    for entry in reports(result):
        assert sum(entry.widths) == 96
        assert min(entry.widths) >= int(LEAST_SHARE * 12)
        assert entry.unused_experts > 0
    assert logits(result, prompt).isfinite().all()


# --- how it is calibrated


def test_padding_and_batching_do_not_count(original, tokens, prompt):
    rows = [row[: 5 + place % 16].tolist() for place, row in enumerate(tokens[:16])]
    left = torch.tensor([[0] * (24 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (24 - len(row)) + [1] * len(row) for row in rows])
    data = [
        load_calibration(rows, batch_size=1, held_out_fraction=0),
        load_calibration(rows[::-1], batch_size=7, held_out_fraction=0),
        load_calibration([{"input_ids": left, "attention_mask": mask}], batch_size=24, held_out_fraction=0),
    ]
    for name in ("mapped-neurons", "native-experts-and-neurons"):
        alone, *others = (fit(original("mixtral"), batches, **RECIPES[name]) for batches in data)
        for other in others:
            assert [x.widths for x in reports(other)] == [x.widths for x in reports(alone)]
            assert_close(logits(other, prompt), logits(alone, prompt), rtol=1e-3, atol=1e-3)


def test_fit_tokens_bounds_what_is_kept(original, tokens, monkeypatch):
    kept, collect = [], kept_inputs.collect

    def spy(*args, **kwargs):
        found = collect(*args, **kwargs)
        kept.extend(one.calibration.num_tokens for one in found.values())
        return found

    monkeypatch.setattr(kept_inputs, "collect", spy)
    fit(original("qwen3_moe"), tokens, keep=0.5, fit_tokens=60, **FIT)
    assert len(kept) == 3 and all(60 <= number <= 60 + 24 for number in kept)


def test_sequential_fits_each_layer_on_what_the_ones_before_give_now(original, tokens, prompt):
    results = {
        sequential: fit(original("qwen3_moe"), tokens, keep=0.5, sequential=sequential, **FIT)
        for sequential in (False, True)
    }
    first, second = ([x.widths for x in reports(results[s])] for s in (False, True))
    assert first[0] == second[0] and first[1:] != second[1:]
    assert not torch.equal(logits(results[True], prompt), logits(results[False], prompt))
    assert all(x.relative_error < 1 for x in reports(results[True]))


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "mapped-neurons"),
        ("qwen3_moe", "native-experts-and-neurons"),
        ("gpt_oss", "native-dropped-refit"),
    ],
)
def test_narrow_weights_give_about_what_float32_gives(model_type, name, original, tokens, prompt):
    narrow = original(model_type).to(torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    before = logits(wide, prompt)
    narrow, wide = (fit(model, tokens, **RECIPES[name]) for model in (narrow, wide))
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    for rounded, exact in zip(reports(narrow), reports(wide), strict=True):
        assert sum(rounded.widths) == sum(exact.widths)
        assert rounded.relative_error < 1.5 * exact.relative_error + 0.02
    changes = [(logits(model, prompt).float() - before).square().mean().item() for model in (narrow, wide)]
    assert changes[0] < 1.5 * changes[1] + 1e-3


# --- streaming and offload


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "mapped-neurons"),
        ("qwen3_moe", "native-dropped-refit"),
        ("gpt_oss", "native-neurons"),
        ("gpt_oss", "mapped-merged-refit"),
    ],
)
def test_streaming_gives_what_compressing_in_memory_gives(model_type, name, checkpoint, stream, tokens, tmp_path):
    folder, recipe = checkpoint(model_type), {"allocation": "uniform", **RECIPES[name]}
    assert stream(folder, **recipe).streaming_summary is not None
    compress_moe(
        folder,
        Recipe(**recipe),
        calibration=tokens,
        output_dir=tmp_path / "whole",
        executor="in_memory",
        progress=False,
    )
    assert same_tensors(tmp_path / "streamed", tmp_path / "whole")
    assert texts(tmp_path / "streamed") == texts(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*(offloaded modules|current device_map).*:UserWarning")
@pytest.mark.parametrize(
    ("way", "name"),
    [("cpu", "mapped-neurons"), ("disk", "native-experts-and-neurons"), ("disk", "native-dropped-refit")],
)
def test_offloaded_models_give_what_models_in_memory_give(way, name, checkpoint, tokens, prompt, tmp_path):
    folder = checkpoint("qwen3_moe")
    expected = fit(AutoModelForCausalLM.from_pretrained(folder), tokens, **RECIPES[name])
    model = AutoModelForCausalLM.from_pretrained(folder)
    if way == "cpu":
        model = cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    result = fit(model, tokens, **RECIPES[name])
    assert torch.equal(logits(result, prompt), logits(expected, prompt))
    assert [x.widths for x in reports(result)] == [x.widths for x in reports(expected)]


# --- recipes that cannot be


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"keep_experts": 0.5}, "keep_experts is 0.5, but selection is None. Use keep, or name a selection"),
        ({**FIT, "num_experts": 4}, "num_experts is 4, but selection 'gated_obs' keeps neurons. Use keep, and"),
        ({**FIT, "keep": 0.5, "keep_experts": 0.4}, "keep_experts is 0.4, it must be in [keep, 1] = [0.5, 1]"),
        ({**FIT, "keep": 0.5, "keep_experts": 1.5}, "keep_experts is 1.5, it must be in [keep, 1]"),
        ({**FIT, "keep": 0.5, "keep_experts": True}, "keep_experts is True, it must be in"),
        ({**FIT, "keep_experts": 0.8, "allocation": "global_usage"}, "allocation is 'global_usage', but with keep_ex"),
        ({**FIT, "fit_tokens": 0}, "fit_tokens is 0, it must be a whole number >= 1"),
        ({**FIT, "fit_tokens": 1.5}, "fit_tokens is 1.5, it must be a whole number >= 1"),
        ({"selection": "gated_obz"}, "gated_obz"),
        ({"refit": "least_square"}, "least_square"),
        ({"refit_options": {"ridges": (1.0,)}}, "refit_options is {'ridges': (1.0,)} but refit is None"),
        ({"selection_options": {"ridge": 1.0}}, "selection_options is {'ridge': 1.0} but selection is None"),
        ({**FIT, "selection_options": {"rigde": 1.0}}, "rigde"),
        (
            {**FIT, "decomposition": "low_rank_sparse"},
            "decomposition is 'low_rank_sparse' and selection is 'gated_obs'",
        ),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(recipe, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**recipe)


def test_layers_that_share_their_experts_are_refused(original, tokens):
    model = original("qwen3_moe")
    first, second = model.model.layers[0].mlp.experts, model.model.layers[1].mlp.experts
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    with pytest.raises(ValueError, match=r"layers that share their experts; selection .* cannot treat them"):
        fit(model, tokens, keep=0.5, **FIT)
