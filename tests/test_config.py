"""MergedSparseMoeConfig: a request that reads like a LoraConfig, and a checkpoint that reads like its base model."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, Glm4MoeConfig, PreTrainedConfig, Qwen3MoeConfig, SwitchTransformersConfig

import hf_mcsmoe.modeling.merged_model  # noqa: F401  (registers the configuration with AutoConfig)
from hf_mcsmoe.config import FORMAT_VERSION, MergedSparseMoeConfig
from hf_mcsmoe.recipe import PRESETS, Recipe
from hf_mcsmoe.recipe_reading import recipe_from_preset

LAYERS = {"model.layers.0.mlp.experts": {"num_experts": 4, "num_slots": 8}}


def base(**changes):
    values = {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 8, "head_dim": 8}
    return Qwen3MoeConfig(**{**values, **changes})


def checkpoint(base_config=None, **changes):
    values = {"base_architecture": "Qwen3MoeForCausalLM", "layers": LAYERS, "recipe": Recipe(keep=0.5).to_dict()}
    return MergedSparseMoeConfig(base_config=base_config or base(), **{**values, **changes})


def reloaded(config, folder, **kwargs):
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder, **kwargs)


# --- as a request


def test_fields_of_a_recipe_are_keyword_arguments():
    config = MergedSparseMoeConfig(keep=0.25, allocation="uniform", exclude_layers=[0])
    assert config.to_recipe() == Recipe(keep=0.25, allocation="uniform", exclude_layers=(0,))
    assert MergedSparseMoeConfig().to_recipe() == Recipe()
    assert config.base_config is None


def test_a_recipe_may_be_given_whole():
    recipe = Recipe(num_experts=3, layout="native")
    assert MergedSparseMoeConfig(recipe=recipe).to_recipe() == recipe
    assert MergedSparseMoeConfig(recipe=recipe.to_dict()).to_recipe() == recipe
    assert MergedSparseMoeConfig(recipe=recipe.to_dict(), seed=5).to_recipe().seed == 5


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_with_changes_is_that_recipe(preset):
    config = MergedSparseMoeConfig.from_preset(preset, keep=0.25, seed=3)
    assert config.to_recipe() == recipe_from_preset(preset, keep=0.25, seed=3)
    assert MergedSparseMoeConfig(preset=preset, keep=0.25, seed=3).to_recipe() == config.to_recipe()


def test_changes_that_take_a_preset_back_to_the_default_are_kept():
    changes = {"grouping": "dominant_experts", "similarity": "router_logits", "merging": "average"}
    recipe = MergedSparseMoeConfig.from_preset("frequency", **changes).to_recipe()
    assert (recipe.grouping, recipe.similarity, recipe.merging) == tuple(changes.values())
    assert recipe.alignment is None


def test_fields_are_read_and_set_as_attributes():
    config = MergedSparseMoeConfig(keep=0.25)
    assert (config.keep, config.merging, config.layout) == (0.25, "weighted_average", "mapped")
    config.keep = 0.75
    config.merging = "average"
    assert config.to_recipe() == Recipe(keep=0.75, merging="average")


def test_what_was_left_open_follows_what_is_set_later():
    config = MergedSparseMoeConfig()
    assert (config.keep, config.allocation) == (0.5, "global_usage")
    config.num_experts = 4
    config.layout = "native"
    assert (config.keep, config.allocation) == (None, "uniform")
    assert config.to_recipe() == Recipe(num_experts=4, layout="native")


@pytest.mark.parametrize("name, value, message", [("keep", 2.0, "keep is 2.0"), ("merging", "avg", "Unknown merging")])
def test_a_value_that_is_not_allowed_is_refused_and_the_old_one_stays(name, value, message):
    with pytest.raises(ValueError, match=message):
        MergedSparseMoeConfig(**{name: value})
    config = MergedSparseMoeConfig(keep=0.25)
    with pytest.raises(ValueError, match=message):
        setattr(config, name, value)
    assert config.to_recipe() == Recipe(keep=0.25)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: MergedSparseMoeConfig(kep=0.5),
        lambda: MergedSparseMoeConfig(recipe={"kep": 0.5}),
        lambda: MergedSparseMoeConfig.from_preset("m-smoe", kep=0.5),
        lambda: setattr(MergedSparseMoeConfig(), "kep", 0.5),
    ],
    ids=["keyword", "recipe", "preset", "attribute"],
)
def test_an_unknown_key_is_refused_with_the_closest_one(ask):
    with pytest.raises(ValueError, match=r"has no (key|field) 'kep'; .*Did you mean 'keep'\?"):
        ask()


def test_a_key_of_a_newer_version_says_how_to_upgrade():
    with pytest.raises(ValueError, match=r"no key 'zzz'.*pip install --upgrade hf-mcsmoe"):
        MergedSparseMoeConfig(zzz=1)


def test_two_budgets_are_refused():
    with pytest.raises(ValueError, match=r"keep is 0.5 and num_experts is 4"):
        MergedSparseMoeConfig(keep=0.5, num_experts=4)


REQUESTS = {
    "default": {},
    "fields": {"keep": 0.25, "exclude_layers": (0, "*.3.*"), "similarity_options": {"center": True}},
    "none": {"preset": "frequency", "num_experts": 4},
}


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_survives_json_copies_and_pickle(fields, tmp_path):
    config = MergedSparseMoeConfig(**fields)
    back = reloaded(config, tmp_path)
    assert type(back) is MergedSparseMoeConfig
    assert back.recipe == config.recipe
    assert MergedSparseMoeConfig.from_pretrained(tmp_path).to_recipe() == config.to_recipe()
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and other.to_recipe() == config.to_recipe()
        other.seed = 99
        assert config.seed == 0  # a copy of its own


def test_a_request_has_no_shape():
    config = MergedSparseMoeConfig()
    assert not hasattr(config, "hidden_size")
    assert config.get_text_config() is config


# --- as the configuration of a checkpoint


def test_attributes_of_the_base_model_are_read_through():
    config = checkpoint()
    assert (config.hidden_size, config.vocab_size, config.num_experts) == (32, 160, 8)
    assert config.num_local_experts == 8  # by attribute_map of the base configuration
    assert config.rope_parameters is config.base_config.rope_parameters
    assert config.get_text_config() is config.base_config
    assert config.model_type == "merged_sparse_moe"


def test_attributes_of_the_base_model_are_set_through():
    config = checkpoint()
    config.hidden_size = 64
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert config.base_config.hidden_size == 64
    assert config.base_config.rope_parameters["rope_theta"] == 5.0
    assert config.layers == LAYERS


def test_attributes_that_neither_has_are_missing():
    config = checkpoint()
    assert not hasattr(config, "nonsense")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = config.nonsense


def test_the_recipe_of_a_checkpoint_is_history():
    config = checkpoint(recipe={"keep": 0.5, "merging": "an_operator_of_another_version"})
    assert config.recipe["merging"] == "an_operator_of_another_version"
    assert not hasattr(config, "keep")


@pytest.mark.parametrize(
    "base_config, name, value",
    [
        (SwitchTransformersConfig(), "is_encoder_decoder", True),
        (base(), "is_encoder_decoder", False),
        (base(num_labels=5), "num_labels", 5),
        (base(), "num_labels", 2),
        (base(dtype=torch.bfloat16), "dtype", torch.bfloat16),
        (base(output_hidden_states=True), "output_hidden_states", True),
    ],
)
def test_fields_that_every_configuration_has_are_those_of_the_base_model(base_config, name, value):
    assert getattr(checkpoint(base_config), name) == value


@pytest.mark.parametrize(
    "name, value",
    [("output_hidden_states", True), ("num_labels", 5), ("dtype", torch.float16), ("problem_type", "regression")],
)
def test_fields_that_every_configuration_has_reach_the_base_model(name, value):
    given = checkpoint(**{name: value})
    assert getattr(given, name) == getattr(given.base_config, name) == value
    later = checkpoint()
    setattr(later, name, value)
    assert getattr(later, name) == getattr(later.base_config, name) == value


def test_the_attention_and_experts_implementations_reach_the_base_model():
    given = checkpoint(attn_implementation="eager", experts_implementation="eager")
    assert given.base_config._attn_implementation == given.base_config._experts_implementation == "eager"
    given._attn_implementation = "sdpa"
    assert given.base_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "name, value, stored",
    [
        ("output_hidden_states", True, "output_hidden_states"),
        ("num_labels", 5, "num_labels"),
        ("dtype", torch.float16, "dtype"),
        ("dtype", "float16", "dtype"),
        ("torch_dtype", torch.float16, "dtype"),
        ("hidden_size", 48, "hidden_size"),
        ("attn_implementation", "eager", "_attn_implementation"),
        ("output_attentions", True, "output_attentions"),
    ],
)
def test_what_auto_config_is_given_reaches_the_base_model(name, value, stored, tmp_path):
    config = reloaded(checkpoint(), tmp_path, **{name: value})
    assert getattr(config.base_config, stored) == value
    assert getattr(config, stored) == value


def test_what_nobody_knows_is_handed_back_by_auto_config(tmp_path):
    checkpoint().save_pretrained(tmp_path)
    config, unused = AutoConfig.from_pretrained(tmp_path, nonsense=1, return_unused_kwargs=True)
    assert unused == {"nonsense": 1}
    assert not hasattr(config, "nonsense")


def test_an_unknown_key_of_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"no key 'hidden_sise'.*pip install --upgrade"):
        checkpoint(hidden_sise=3)


def test_a_newer_format_is_refused_with_the_remedy(tmp_path):
    message = rf"has format_version {FORMAT_VERSION + 1}, this hf_mcsmoe reads up to {FORMAT_VERSION}. Upgrade it: pip"
    with pytest.raises(ValueError, match=message):
        checkpoint(format_version=FORMAT_VERSION + 1)
    checkpoint().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


BASES = {
    "qwen3_moe": base(),
    "five labels, bfloat16": base(num_labels=5, dtype=torch.bfloat16, output_hidden_states=True),
    "switch": SwitchTransformersConfig(d_model=32, num_experts=8, pad_token_id=0),
    "glm4_moe, partial rotary": Glm4MoeConfig(hidden_size=32, n_routed_experts=8),
}


@pytest.mark.parametrize("base_config", BASES.values(), ids=BASES.keys())
def test_a_checkpoint_survives_json_copies_and_pickle(base_config, tmp_path):
    original = copy.deepcopy(base_config)
    config = checkpoint(copy.deepcopy(base_config), provenance={"base_model": "x/y"})
    assert type(config.base_config) is type(original)
    back = reloaded(config, tmp_path)
    for other in (back, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert isinstance(other, MergedSparseMoeConfig)
        assert (other.layers, other.recipe, other.provenance) == (LAYERS, config.recipe, {"base_model": "x/y"})
        assert other.base_config.to_diff_dict() == original.to_diff_dict()
        assert (other.num_labels, other.is_encoder_decoder) == (original.num_labels, original.is_encoder_decoder)
        other.layers["model.layers.0.mlp.experts"]["num_experts"] = 99
        other.vocab_size = 7
        assert config.layers == LAYERS and config.vocab_size == original.vocab_size


def test_the_file_holds_each_value_of_the_base_model_once(tmp_path):
    checkpoint().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["base_config"]["model_type"] == "qwen3_moe"
    assert not set(values) & set(values["base_config"]) - {"model_type", "transformers_version", "architectures"}


def test_no_source_file_is_copied_into_a_checkpoint(tmp_path):
    MergedSparseMoeConfig.register_for_auto_class()
    checkpoint().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert PreTrainedConfig._auto_class is None
