"""Checkpoints with experts of other forms than dense: saved, loaded, trained, offloaded, counted."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from form_models import FORM_NAMES, FORMED, IDS, adopt, change_layer, formed_model, logits
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_mcsmoe import Recipe
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling.densify import densify, harden
from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.modeling.merged_model import merged_class
from hf_mcsmoe.planning import plan

pytestmark = pytest.mark.filterwarnings("ignore:.*(offloaded modules|current device_map).*:UserWarning")


def auto_class(model):
    return AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM


def load(model, folder, **kwargs):
    """The checkpoint in `folder`; asserts that every tensor was there and used."""
    loaded, info = auto_class(model).from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return loaded.eval()


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("family", FORMED)
@torch.no_grad()
def test_saved_and_loaded_is_bit_identical(family, form, tmp_path):
    model = formed_model(family, form)
    expected = logits(model)
    model.save_pretrained(tmp_path / "whole")
    loaded = load(model, tmp_path / "whole")
    assert torch.equal(logits(loaded), expected)
    assert loaded.config.merged_sparse_moe["layers"] == model.config.merged_sparse_moe["layers"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(model, tmp_path / "shards")), expected)
    densify(loaded)
    expected = logits(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load(model, tmp_path / "dense")), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORM_NAMES)
@torch.no_grad()
def test_half_precision_is_kept(form, dtype, tmp_path):
    for family in ("gpt_oss", "switch_transformers"):
        model = formed_model(family, form, dtype=dtype)
        model.save_pretrained(tmp_path / family)
        loaded = load(model, tmp_path / family)
        kept = loaded.state_dict()  # norms of some families are float32 in float16 models
        for name, tensor in model.state_dict().items():
            if ".experts." in name:
                assert tensor.dtype in (dtype, torch.int64)
                assert kept[name].dtype == tensor.dtype and torch.equal(kept[name], tensor)


@torch.no_grad()
def test_hardened_checkpoints_are_smaller(tmp_path):
    model = formed_model("qwen3_moe", "low_rank_sparse")
    model.save_pretrained(tmp_path / "before")
    for experts in form_layers(model).values():
        for part in experts.sparse_parts().values():
            part.parameter[part.row % 2 == 0] = 0
    harden(model)
    model.save_pretrained(tmp_path / "after")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "after")]
    assert sizes[1] < sizes[0]
    assert torch.equal(logits(load(model, tmp_path / "after")), logits(model))


def test_other_heads_load_the_same_experts(tmp_path):
    model = formed_model("qwen3_moe", "ragged")
    model.save_pretrained(tmp_path)
    headed, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(headed.model.state_dict()[name], tensor)


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("family", FORMED)
def test_models_from_a_configuration_compute(family, form):
    model = formed_model(family, form)
    made = type(model)._from_config(copy.deepcopy(model.config)).eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == shapes
    assert torch.isfinite(logits(made)).all()
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config))
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in empty.state_dict().values())


def test_unknown_forms_are_refused():
    model = formed_model("qwen3_moe", "ragged")
    config = copy.deepcopy(model.config)
    next(iter(config.merged_sparse_moe["layers"].values()))["form"] = "raggedd"
    with pytest.raises(ValueError, match=r"Unknown expert form 'raggedd'.*'ragged'"):
        type(model)._from_config(config)


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.slow
def test_trainer_trains_and_resumes(form, tmp_path):
    model = formed_model("qwen3_moe", form)
    model.save_pretrained(tmp_path / "start")
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def train(folder, steps, **kwargs):
        arguments = TrainingArguments(
            tmp_path / folder,
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(load(model, tmp_path / "start"), arguments, train_dataset=rows)
        trainer.train(**kwargs)
        return trainer.model.eval()

    straight = train("straight", 2)
    train("resumed", 1)
    resumed = train("resumed", 2, resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-1"))
    for name, parameter in straight.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name
        if ".experts." in name:
            assert not torch.equal(model.get_parameter(name), parameter), name
    assert torch.equal(logits(load(model, tmp_path / "resumed" / "checkpoint-2")), logits(straight))


@pytest.mark.parametrize("form", FORM_NAMES)
def test_lora_on_attention(form, tmp_path):
    formed_model("qwen3_moe", form).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), expected)


def offload(model, where, folder):
    if where == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("form", FORM_NAMES)
@torch.no_grad()
def test_offloaded_before_or_after(form, where, tmp_path):
    for family in ("qwen3_moe", "switch_transformers"):
        model = formed_model(family, form)
        expected = logits(model)
        after = offload(copy.deepcopy(model), where, tmp_path / f"{family}-after")
        assert torch.equal(logits(after), expected)
        before = offload(tiny_model(family), where, tmp_path / f"{family}-before")
        before_files = {f: f.read_bytes() for f in (tmp_path / f"{family}-before").glob("*.dat")}
        generator, layers = torch.Generator().manual_seed(1), {}
        with_weights = find_layers(tiny_model(family))
        for layer, source in zip(find_layers(before), with_weights, strict=True):
            layers[layer.name] = change_layer(layer, form, 5, generator, source)
        adopt(before, layers)
        assert torch.equal(logits(before), expected)
        assert all(file.read_bytes() == content for file, content in before_files.items())
        if family == "qwen3_moe":
            assert all(p.is_meta for name, p in before.named_parameters() if ".experts." in name)
        before.save_pretrained(tmp_path / f"{family}-saved")
        assert torch.equal(logits(load(model, tmp_path / f"{family}-saved")), expected)
        densify(before)
        torch.testing.assert_close(logits(before), expected, rtol=1e-4, atol=1e-5)


def switch_base_32():
    """The shapes of google/switch-base-32."""
    return SwitchTransformersConfig(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_decoder_layers=12,
        num_sparse_encoder_layers=6,
        num_sparse_decoder_layers=6,
        num_heads=12,
        num_experts=32,
    )


@pytest.mark.parametrize(("form", "millions"), [(None, 733), ("low_rank_sparse", 381)])
def test_built_modules_have_the_sizes_of_the_paper_and_of_the_plan(form, millions):
    config = switch_base_32()
    options = {"num_experts": 8, "exclude_layers": (0,), "allocation": "uniform"}
    if form is not None:
        options |= {"decomposition": form, "decomposition_options": {"rank": 32, "keep_rows": 0.1}}
    planned = plan(config, Recipe(**options))
    entry = {"num_experts": 8, "num_slots": 32, "has_dropped": False, "collapse_duplicates": False}
    if form is not None:
        entry |= {"form": form, "rank": 32, "num_rows": {"up": 8 * 307, "down": 8 * 77}}
    config.merged_sparse_moe = {"layers": {x.name: dict(entry) for x in planned.layers if not x.excluded}}
    with torch.device("meta"):
        model = merged_class(SwitchTransformersForConditionalGeneration)(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == planned.total_parameters_after
    assert round(parameters / 1e6) == millions
