"""MC-SMoE through the public calls: merge and decompose, save, load, recover while rows are pruned, save, load."""

import pytest
import torch
from checkpoints import content, same_tensors, tensors
from distillation import arguments, examples
from transformers import AutoModelForCausalLM

import hf_mcsmoe
from hf_mcsmoe import (
    DistillationTrainer,
    MergedSparseMoeConfig,
    Recipe,
    SparsityScheduleCallback,
    compress_moe,
    decompose_merged,
    densify,
    lora_config,
    plan,
    prune_by_gradients,
)
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.recipe import PRESETS
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.sizes import measure
from hf_mcsmoe.training import sparse_parts
from hf_mcsmoe.training.recovery_data import RowCollator
from hf_mcsmoe.training.row_pruner import count_rows

RULES = ("low_rank_sparse", "whitened_low_rank_sparse")


def num_rows(model):
    return sum(part.row.numel() for part in sparse_parts(model).values())


def test_the_preset_is_that_of_the_paper():
    # Li et al., 2024, section 4.1: M-SMoE, then rank 32 and 10 % of the rows.
    recipe = recipe_from_preset("mc-smoe")
    merging = recipe_from_preset("m-smoe").to_dict()
    assert {**merging, **PRESETS["mc-smoe"].recipe, "preset": "mc-smoe"} == recipe.to_dict()
    assert recipe.decomposition_options == {"rank": 32, "keep_rows": 0.1}
    assert "loses much without" in PRESETS["mc-smoe"].notes
    whitened = recipe_from_preset("mc-smoe", decomposition="whitened_low_rank_sparse")
    assert whitened.decomposition_options == recipe.decomposition_options and whitened.needs_inputs


def test_from_merging_to_a_recovered_checkpoint(original, tokens, prompt, tmp_path):
    teacher = original("qwen3_moe")
    config = MergedSparseMoeConfig.from_preset(
        "mc-smoe", keep=0.5, decomposition_options={"rank": 4, "keep_rows": 1.0}
    )
    model = compress_moe(original("qwen3_moe"), config, calibration=tokens, progress=False)
    model.save_pretrained(tmp_path / "merged")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(student(prompt).logits, model(prompt).logits)
    args = arguments(tmp_path / "run", max_steps=30, learning_rate=1e-3, task_weight=0.0)
    trainer = DistillationTrainer(
        student,
        args,
        teacher=teacher,
        train_dataset=examples("causal"),
        eval_dataset=examples("causal"),
        data_collator=RowCollator(0, "causal"),
        callbacks=[SparsityScheduleCallback(final_keep=0.2)],
    )
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert num_rows(student) == int(0.2 * count_rows(student) + 0.5)
    assert trainer.evaluate()["eval_kl"] < before  # though four fifths of the rows are gone
    trainer.save_model(tmp_path / "recovered")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(prompt).logits, student.eval()(prompt).logits)
    sizes = [sum(t.numel() for t in tensors(tmp_path / name).values()) for name in ("merged", "recovered")]
    assert sizes[1] < sizes[0]


def test_without_training_rows_are_pruned_by_gradients(compress, tokens, prompt):
    model = compress("qwen3_moe", num_experts=3)
    expected = model(prompt).logits
    decompose_merged(model, rank=4, keep_rows=1.0, progress=False)
    torch.testing.assert_close(model(prompt).logits, expected, atol=1e-5, rtol=1e-5)
    prune_by_gradients(model, load_calibration(tokens), keep_rows=0.1, progress=False)
    assert num_rows(model) == int(0.1 * count_rows(model) + 0.5)
    decomposed = model(prompt).logits
    densify(model)
    assert not form_layers(model) and len(find_layers(model)) == 3
    torch.testing.assert_close(model(prompt).logits, decomposed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "switch_transformers"])
def test_outputs_lose_less_in_the_metric_of_the_inputs(family, compress):
    errors = {}
    for rule in RULES:
        options = {"decomposition": rule, "decomposition_options": {"rank": 3, "keep_rows": 0.1}}
        reports = compress(family, num_experts=4, allocation="uniform", **options).compression_report.layers
        errors[rule] = [report.relative_error for report in reports]
    merged = compress(family, num_experts=4, allocation="uniform").compression_report.layers
    # Of the whole layer and on tokens that were held out: most of it is what merging did already.
    means = [sum(errors[rule]) / len(merged) for rule in RULES]
    assert means[1] < means[0]
    assert errors[RULES[1]] != errors[RULES[0]] != [report.relative_error for report in merged]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "switch_transformers"])
def test_bytes_on_disk_and_sizes_are_those_of_the_plan(rule, family, original, compress, tmp_path):
    options = {"decomposition": rule, "decomposition_options": {"rank": 3, "keep_rows": 0.1}}
    options |= {"num_experts": 3, "allocation": "uniform", "exclude_layers": (0,)}
    model = compress(family, **options)
    model.save_pretrained(tmp_path)
    planned = plan(original(family), Recipe(**options))
    stored = tensors(tmp_path)
    assert sum(t.numel() * t.element_size() for t in stored.values()) == planned.total_bytes_after
    assert sum(p.numel() for p in model.parameters()) == planned.total_parameters_after
    sizes = measure(model, find_layers(model))
    for name in ("total_parameters", "active_parameters", "expert_parameters", "total_bytes", "expert_bytes"):
        assert getattr(sizes, name) == getattr(planned, f"{name}_after"), name
    assert sizes.flops_per_token == planned.flops_per_token_after
    report = model.compression_report
    assert report.total_parameters_after == planned.total_parameters_after
    assert sum(layer.bytes_after for layer in report.layers) == sum(
        layer.expert_bytes_after for layer in planned.layers if not layer.excluded
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_streaming_writes_the_same_bytes(rule, family, checkpoint, stream, tokens, tmp_path):
    options = {"decomposition": rule, "decomposition_options": {"rank": 3, "keep_rows": 0.1}, "allocation": "uniform"}
    stream(checkpoint(family), **options)
    how = {"calibration": tokens, "output_dir": tmp_path / "whole", "executor": "in_memory", "progress": False}
    compress_moe(checkpoint(family), Recipe(**options), **how)
    assert same_tensors(tmp_path / "streamed", tmp_path / "whole") and content(tmp_path / "streamed")
    assert any("_sparse" in name for name in tensors(tmp_path / "streamed"))


@pytest.mark.parametrize("form", ["low_rank_sparse", "ragged"])
def test_what_has_another_form_is_not_compressed_again(form, compress, tokens):
    steps = {"low_rank_sparse": {"decomposition": form, "decomposition_options": {"rank": 3}}}
    steps["ragged"] = {"similarity": None, "grouping": "drop", "alignment": None, "merging": None}
    steps["ragged"] |= {"selection": "gated_obs", "refit": "least_squares"}
    model = compress("qwen3_moe", **steps[form])
    assert {experts.form for experts in form_layers(model).values()} == {form}
    for action in (lambda: compress_moe(model, "m-smoe", calibration=tokens), lambda: plan(model, Recipe())):
        with pytest.raises(ValueError, match=r"is already compressed .* Start from the original model"):
            action()


def test_names_of_training_are_there_without_importing_it_first():
    for name in hf_mcsmoe.__all__:
        assert getattr(hf_mcsmoe, name) is not None
    assert set(hf_mcsmoe.__all__) <= set(dir(hf_mcsmoe))
    assert lora_config.__module__ == "hf_mcsmoe.training.lora"
    with pytest.raises(AttributeError, match="has no attribute 'DistilationTrainer'"):
        hf_mcsmoe.DistilationTrainer  # noqa: B018
