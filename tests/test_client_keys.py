"""config.json of native results: old and new spellings of what other runtimes read, and nothing else changed."""

import json

import pytest
import torch
from tiny_models import CAUSAL_FAMILIES, in_every_run, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_mcsmoe import Recipe, compress_moe, push_to_hub
from hf_mcsmoe.modeling.client_keys import add_client_keys, raw_config
from hf_mcsmoe.publishing import hub

ALL = (*CAUSAL_FAMILIES, "switch_transformers")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def saved(config, folder):
    config.save_pretrained(folder)
    return config_of(folder)


@pytest.mark.parametrize("model_type", in_every_run(ALL))
def test_transformers_reads_the_same_configuration(model_type, tmp_path):
    config = tiny_config(model_type)
    before = saved(config, tmp_path)
    expected = AutoConfig.from_pretrained(tmp_path).to_dict()
    add_client_keys(tmp_path, config)
    after = config_of(tmp_path)
    assert {**after, **before} == after
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == expected
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == before


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 8, "rope_theta": 500.0, "rope_scaling": None}),
        ("mixtral", {"num_experts": 8, "num_local_experts": 8, "rope_theta": 500.0, "rope_scaling": None}),
        ("olmoe", {"num_experts": 8, "num_local_experts": 8, "rope_theta": 500.0, "rope_scaling": None}),
        ("granitemoe", {"num_local_experts": 8, "rope_theta": 500.0}),
        ("deepseek_v3", {"n_routed_experts": 8, "num_local_experts": 8, "rope_theta": 500.0}),
        ("glm4_moe", {"n_routed_experts": 8, "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    ],
)
def test_both_spellings_are_there(model_type, expected, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = tiny_config(model_type, rope_parameters=rope)
    saved(config, tmp_path)
    add_client_keys(tmp_path, config)
    values = config_of(tmp_path)
    assert expected.items() <= values.items()
    assert values["rope_parameters"]["rope_theta"] == 500.0


def test_a_scaled_rope_keeps_its_scaling_in_both_spellings(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 32}
    config = tiny_config("qwen3_moe", rope_parameters=rope)
    saved(config, tmp_path)
    expected = AutoConfig.from_pretrained(tmp_path).rope_parameters
    add_client_keys(tmp_path, config)
    values = config_of(tmp_path)
    del rope["rope_theta"]
    assert rope.items() <= values["rope_scaling"].items() and "rope_theta" not in values["rope_scaling"]
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == expected


def test_one_rope_per_type_of_layer_has_no_old_spelling(tmp_path):
    config = tiny_config("gemma4_text")
    saved(config, tmp_path)
    add_client_keys(tmp_path, config)
    assert not {"rope_theta", "rope_scaling"} & set(config_of(tmp_path))


def test_the_spellings_of_the_base_models_file_are_kept_with_the_values_of_the_result(tmp_path):
    config = tiny_config("qwen3_moe", num_experts=4)
    saved(config, tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    inherited = {"num_experts": 8, "num_local_experts": 8, "sliding_window_pattern": 3, "eos": [1, 2], "nothing": None}
    not_inherited = {"quantization_config": {"bits": 4}, "auto_map": {"AutoConfig": "x"}, "_name_or_path": "/secret"}
    counts_of_old = {"moe_num_experts": 8, "ffn_dim": 24, "transformers_version": "4.51.0", "architectures": ["Other"]}
    (base / "config.json").write_text(json.dumps({**inherited, **not_inherited, **counts_of_old}))
    add_client_keys(tmp_path, config, str(base))
    values = config_of(tmp_path)
    assert values["num_experts"] == values["num_local_experts"] == 4
    assert (values["sliding_window_pattern"], values["eos"], values["nothing"]) == (3, [1, 2], None)
    assert not {*not_inherited, "moe_num_experts", "ffn_dim"} & set(values)
    assert values.get("architectures") != ["Other"] and values["transformers_version"] != "4.51.0"


def test_a_key_that_the_configuration_knows_by_another_name_says_what_the_result_has(tmp_path):
    config = tiny_config("deepseek_v3")
    saved(config, tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"num_mtp_layers": 7}))
    add_client_keys(tmp_path, config, str(tmp_path / "base"))
    assert config_of(tmp_path)["num_mtp_layers"] == config.num_nextn_predict_layers == 0


def test_inner_configurations_are_treated_too(tmp_path):
    text = tiny_config("qwen3_moe").to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 900.0}}
    text.pop("model_type")
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text)
    saved(config, tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"text_config": {"decoder_kind": "moe"}, "kind": "x"}))
    add_client_keys(tmp_path, config, str(tmp_path / "base"))
    values = config_of(tmp_path)
    assert values["text_config"]["rope_theta"] == 900.0 and values["text_config"]["decoder_kind"] == "moe"
    assert values["kind"] == "x" and "decoder_kind" not in values and "rope_theta" not in values


def test_a_base_model_that_is_not_here_or_damaged_adds_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert raw_config(None) == raw_config("nobody/nothing") == raw_config(str(tmp_path)) == {}
    (tmp_path / "config.json").write_text("[1]")
    assert raw_config(str(tmp_path)) == {}


def test_a_base_model_in_the_cache_is_read_without_a_server(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"a": 1}')
    asked = []

    def cached(repo_id, name):
        asked.append((repo_id, name))
        return str(tmp_path / "config.json")

    monkeypatch.setattr("hf_mcsmoe.modeling.client_keys.try_to_load_from_cache", cached)
    assert raw_config("owner/name") == {"a": 1} and asked == [("owner/name", "config.json")]


@pytest.mark.parametrize("executor", ["in_memory", "streaming"])
def test_native_results_have_the_keys_and_mapped_ones_do_not(executor, layout, own_checkpoint, tokens, tmp_path):
    values = config_of(own_checkpoint) | {"of_the_base": "yes"}
    (own_checkpoint / "config.json").write_text(json.dumps(values))
    recipe = Recipe(keep=0.5, layout=layout)
    output = tmp_path / "out"
    compress_moe(own_checkpoint, recipe, calibration=tokens, output_dir=output, executor=executor, progress=False)
    values = config_of(output)
    if layout == "mapped":
        assert "rope_theta" not in values and "num_experts" not in values
        return
    assert (values["num_experts"], values["num_local_experts"], values["rope_theta"]) == (4, 4, 10_000.0)
    assert values["of_the_base"] == "yes"
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.num_experts == 4 and model.dtype == torch.bfloat16


def test_a_pushed_native_model_has_the_keys(tokens, monkeypatch):
    model = compress_moe(tiny_model("qwen3_moe"), Recipe(layout="native"), calibration=tokens, progress=False)
    pushed = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):  # noqa: ARG002
            return type("Url", (), {"repo_id": repo_id})

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "push_checkpoint", lambda folder, *_, **__: pushed.update(config_of_text(folder)))
    push_to_hub(model, "me/model")
    assert pushed["num_experts"] == 4 and pushed["rope_theta"] == 10_000.0


def config_of_text(folder):
    with open(f"{folder}/config.json") as file:
        return json.load(file)
