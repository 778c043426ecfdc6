import json

import pytest
import torch
from tiny_models import CAUSAL_FAMILIES, in_every_run, tiny_config, tiny_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeModel,
)

from hf_mcsmoe.config import MergedSparseMoeConfig
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.loading import (
    auto_class_of,
    config_dtype,
    empty_model,
    load_model,
    load_tokenizer,
    native_class,
    read_config,
)

ALL_FAMILIES = (*CAUSAL_FAMILIES, "switch_transformers")


def merged_config(num_experts: int) -> MergedSparseMoeConfig:
    """A mapped checkpoint's configuration: tiny qwen3_moe whose layer 1 stores `num_experts` of 8 experts."""
    base = tiny_config("qwen3_moe", dtype="bfloat16")
    layout = {"num_experts": num_experts, "num_slots": 8, "has_dropped": False, "collapse_duplicates": False}
    return MergedSparseMoeConfig(
        base_config=base, base_architecture="Qwen3MoeForCausalLM", layers={"model.layers.1.mlp.experts": layout}
    )


@pytest.fixture
def folder(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("family", in_every_run(ALL_FAMILIES))
def test_empty_model_has_the_shapes_of_the_real_one_and_no_memory(family):
    config = tiny_config(family)
    before = config.to_dict()
    empty, real = empty_model(config), tiny_model(family)
    assert type(empty) is type(real)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert {n: b.shape for n, b in empty.named_buffers()} == {n: b.shape for n, b in real.named_buffers()}
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    assert config.to_dict() == before
    assert len(find_layers(empty)) == len(find_layers(real)) >= 2


@pytest.mark.parametrize("family", in_every_run(ALL_FAMILIES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_empty_model_has_the_dtypes_that_loading_gives(family, dtype, tmp_path):
    real = tiny_model(family)
    real.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=dtype)
    empty = empty_model(tiny_config(family, dtype=dtype))
    assert {n: t.dtype for n, t in empty.state_dict().items()} == {n: t.dtype for n, t in loaded.state_dict().items()}


def test_a_model_of_671_billion_parameters_needs_no_memory():
    model = empty_model(DeepseekV3Config(dtype="bfloat16"))  # the defaults are those of DeepSeek-V3
    assert sum(p.numel() for p in model.parameters()) > 6e11


def test_tied_weights_of_an_empty_model_are_one_tensor():
    model = empty_model(tiny_config("qwen3_moe", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_empty_model_of_a_mapped_checkpoint_has_its_experts_and_map():
    empty = empty_model(merged_config(3))
    layers = find_layers(empty)
    assert [(layer.num_experts, layer.num_slots) for layer in layers] == [(8, 8), (3, 8), (8, 8)]
    assert empty.model.layers[1].mlp.experts.expert_map.index.dtype == torch.int64
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16}
    assert native_class(merged_config(3)) is Qwen3MoeForCausalLM
    assert auto_class_of(merged_config(3)) is AutoModelForCausalLM


def test_a_request_describes_no_model():
    with pytest.raises(ValueError, match="is a request for compress_moe, it describes no model"):
        native_class(MergedSparseMoeConfig(keep=0.5))


@pytest.mark.parametrize(
    "architecture, model_class, auto_class",
    [
        ("Qwen3MoeForCausalLM", Qwen3MoeForCausalLM, AutoModelForCausalLM),
        ("Qwen3MoeModel", Qwen3MoeModel, AutoModel),
        ("Qwen3MoeForSequenceClassification", Qwen3MoeForSequenceClassification, AutoModelForSequenceClassification),
        ("NoSuchClass", Qwen3MoeForCausalLM, AutoModelForCausalLM),
        ("is_torch_available", Qwen3MoeForCausalLM, AutoModelForCausalLM),  # a name of transformers, but no model
        (None, Qwen3MoeForCausalLM, AutoModelForCausalLM),
    ],
)
def test_the_architecture_decides_the_class(architecture, model_class, auto_class):
    config = tiny_config("qwen3_moe", architectures=[architecture] if architecture else None)
    assert native_class(config) is model_class
    assert auto_class_of(config) is auto_class


def test_a_multimodal_configuration_gives_the_whole_model_not_its_text_half():
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration

    config = Qwen3_5MoeConfig()
    assert native_class(config) is Qwen3_5MoeForConditionalGeneration
    config.architectures = ["Qwen3_5MoeForCausalLM"]
    assert native_class(config) is Qwen3_5MoeForCausalLM
    assert type(empty_model(config)) is Qwen3_5MoeForCausalLM


def test_unknown_configurations_are_refused():
    class NewConfig(PreTrainedConfig):
        model_type = "brand_new"

    with pytest.raises(ValueError, match=r"no model class for the configuration NewConfig.*trust_remote_code=True"):
        native_class(NewConfig())


def test_dtype_is_that_of_the_configuration_or_float32():
    assert config_dtype(tiny_config("mixtral")) is torch.float32
    assert config_dtype(tiny_config("mixtral", dtype="bfloat16")) is torch.bfloat16
    assert config_dtype(merged_config(3)) is torch.bfloat16


def test_configurations_are_read_from_objects_folders_and_files(folder):
    config = tiny_config("mixtral")
    assert read_config(config) is config
    copy = folder.parent / "other-name.json"
    copy.write_text((folder / "config.json").read_text())
    for source in (folder, str(folder), folder / "config.json", copy):
        assert read_config(source).model_type == "qwen3_moe"


@pytest.mark.usefixtures("folder")
def test_read_config_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"has no config.json. There is one in .*tiny"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no folder or file '.*/tinny'. Did you mean 'tiny'\?"):
        read_config(tmp_path / "tinny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config.json. Give the folder that holds it"):
        read_config(tmp_path / "empty")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds a PEFT adapter, not a model.*merge_and_unload"):
        read_config(tmp_path / "adapter")
    with pytest.raises(TypeError, match="A model is a path, a Hub id or a configuration, got int"):
        read_config(5)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="'nobody/no-such-model' is no folder here, and no model of that name"):
        read_config("nobody/no-such-model")


def test_a_damaged_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(OSError, match="not a valid JSON file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(ValueError, match="no_such_type"):
        read_config(tmp_path)


def test_load_model_gives_the_saved_model_with_its_head(folder):
    original, loaded = tiny_model("qwen3_moe"), load_model(folder)
    input_ids = torch.arange(3, 15)[None]
    assert type(loaded) is Qwen3MoeForCausalLM
    assert torch.equal(loaded(input_ids).logits, original(input_ids).logits)
    assert load_model(folder, dtype="bfloat16").dtype is torch.bfloat16


def test_load_model_finds_the_class_of_other_heads(tmp_path):
    tiny_model("switch_transformers").save_pretrained(tmp_path / "switch")
    assert auto_class_of(read_config(tmp_path / "switch")) is AutoModelForSeq2SeqLM
    assert type(load_model(tmp_path / "switch")).__name__ == "SwitchTransformersForConditionalGeneration"
    base = tiny_model("qwen3_moe").model
    base.save_pretrained(tmp_path / "base")
    assert type(load_model(tmp_path / "base")) is Qwen3MoeModel


def test_a_folder_without_weights_cannot_be_loaded(tmp_path):
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        load_model(tmp_path)


def test_load_tokenizer_gives_none_where_there_is_none(folder):
    assert load_tokenizer(folder) is None
    save_word_tokenizer(folder)
    assert load_tokenizer(folder)("two three")["input_ids"] == [2, 3]
    assert load_tokenizer(folder / "config.json")("three")["input_ids"] == [3]


def save_word_tokenizer(folder):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "one": 1, "two": 2, "three": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
