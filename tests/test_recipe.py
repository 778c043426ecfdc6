"""A recipe refuses what cannot be done, and says the same thing after every round trip."""

import dataclasses
import inspect
import json

import pytest
import yaml
from tiny_models import tiny_config

from hf_mcsmoe.decomposition import DECOMPOSITION
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.loading import empty_model
from hf_mcsmoe.recipe import PRESETS, STEPS, Recipe
from hf_mcsmoe.recipe_reading import RECIPE_FIELDS, recipe_from_dict, recipe_from_preset, recipe_from_yaml
from hf_mcsmoe.sizes import expert_size

LOW_RANK = {"decomposition": "low_rank_sparse"}

REFUSED = {
    "unknown layout": ({"layout": "maped"}, r"layout is 'maped', allowed are .* Did you mean 'mapped'\?"),
    "two budgets": ({"keep": 0.5, "num_experts": 4}, r"keep is 0.5 and num_experts is 4.*Give one of them"),
    "keep of none": ({"keep": 0.0}, r"keep is 0.0, it must be in \(0, 1\]"),
    "keep below": ({"keep": -0.25}, r"keep is -0.25, it must be in \(0, 1\]"),
    "keep above": ({"keep": 1.01}, r"keep is 1.01, it must be in \(0, 1\]"),
    "keep of percent": ({"keep": 50}, r"keep is 50, it must be in \(0, 1\]"),
    "keep as text": ({"keep": "0.5"}, r"keep is '0.5', it must be in \(0, 1\]"),
    "keep as yes": ({"keep": True}, r"keep is True, it must be in \(0, 1\]"),
    "keep of nan": ({"keep": float("nan")}, r"keep is nan, it must be in \(0, 1\]"),
    "no experts": ({"num_experts": 0}, r"num_experts is 0, it must be a whole number >= 1"),
    "half an expert": ({"num_experts": 4.5}, r"num_experts is 4.5, it must be a whole number >= 1"),
    "experts as yes": ({"num_experts": True}, r"num_experts is True, it must be a whole number >= 1"),
    "saliency": ({"saliency": "usage"}, r"Unknown saliency 'usage'; choose one of .*'usage_frequency'"),
    "allocation": ({"allocation": "uniformly"}, r"Unknown allocation 'uniformly'.*Did you mean 'uniform'"),
    "similarity": ({"similarity": "router_logit"}, r"Unknown similarity.*Did you mean 'router_logits'"),
    "grouping": ({"grouping": "dominant_expert"}, r"Unknown grouping.*Did you mean 'dominant_experts'"),
    "alignment": ({"alignment": "weight_match"}, r"Unknown alignment.*Did you mean 'weight_matching'"),
    "merging": ({"merging": "weighted_avg"}, r"Unknown merging operator.*Did you mean 'weighted_average'"),
    "importance": ({"importance": "usage_freq"}, r"Unknown saliency.*Did you mean 'usage_frequency'"),
    "a needed step": ({"grouping": None}, r"Unknown grouping None; choose one of"),
    "unknown option": (
        {"similarity_options": {"centre": True}},
        r"similarity 'router_logits' has no option 'centre'; it has \['center'\]\. Did you mean 'center'\?",
    ),
    "option of another rule": (
        {"allocation": "uniform", "allocation_options": {"min_experts": 2}},
        r"allocation 'uniform' has no option 'min_experts'; it has \[\]",
    ),
    "options of no step": (
        {"similarity": None, "grouping": "drop", "similarity_options": {"center": True}},
        r"similarity_options is \{'center': True\} but similarity is None. Name the similarity",
    ),
    "options of nothing": ({"merging_options": None}, r"merging_options is None, it must map names to values"),
    "options as a list": ({"merging_options": ["a"]}, r"merging_options is \['a'\], it must map names to values"),
    "native by usage": (
        {"layout": "native", "allocation": "global_usage"},
        r"allocation is 'global_usage', but layout 'native' needs the same number.*Use allocation='uniform'",
    ),
    "native but one": (
        {"layout": "native", "exclude_layers": [0]},
        r"exclude_layers is \[0\], but layout 'native' needs the same number.*Use layout='mapped'",
    ),
    "exclude as text": ({"exclude_layers": "*.0.*"}, r"exclude_layers is '\*\.0\.\*', it must be a list"),
    "exclude a number": ({"exclude_layers": 0}, r"exclude_layers is 0, it must be a list.*Put one entry into a list"),
    "leaders alone": ({"similarity": None}, r"grouping 'dominant_experts' needs a similarity, got None"),
    "collapse": ({"collapse_duplicates": "always"}, r"collapse_duplicates is 'always', allowed are True, False and"),
    "decomposition": (
        {"decomposition": "svd"},
        r"Unknown decomposition 'svd'; choose one of \['importance_ranked', 'low_r",
    ),
    "native factors": ({**LOW_RANK, "layout": "native"}, r"decomposition needs layout 'mapped', got 'native'"),
    "decomposition option": (
        {**LOW_RANK, "decomposition_options": {"ranks": 8}},
        r"decomposition 'low_rank_sparse' has no option 'ranks'; it has .*'keep_rows'.* Did you mean 'rank'\?",
    ),
    "rank": ({**LOW_RANK, "decomposition_options": {"rank": 0}}, r"rank is 0, it must be a whole number >= 1"),
    "rank of 8.0": ({**LOW_RANK, "decomposition_options": {"rank": 8.0}}, r"rank is 8.0, it must be a whole number"),
    "rows": ({**LOW_RANK, "decomposition_options": {"keep_rows": 1.5}}, r"keep_rows is 1.5, it must be in \[0, 1\]"),
    "rows as text": ({**LOW_RANK, "decomposition_options": {"keep_rows": "all"}}, r"keep_rows is 'all', it must be"),
    "rank as yes": ({**LOW_RANK, "decomposition_options": {"rank": True}}, r"rank is True, it must be a whole number"),
    "rank and ratio": (
        {**LOW_RANK, "decomposition_options": {"rank": 4, "parameter_ratio": 0.1}},
        r"rank is 4 and parameter_ratio is 0.1; they say the same. Give one",
    ),
    "ratio": (
        {**LOW_RANK, "decomposition_options": {"parameter_ratio": 0}},
        r"parameter_ratio is 0, it must be in \(0, 1\]",
    ),
    "ratio as text": (
        {**LOW_RANK, "decomposition_options": {"parameter_ratio": "0.1"}},
        r"parameter_ratio is '0.1', it must be in",
    ),
    "alternations": (
        {**LOW_RANK, "decomposition_options": {"alternations": -1}},
        r"alternations is -1, it must be a whole number >= 0",
    ),
    "rows of nan": (
        {**LOW_RANK, "decomposition_options": {"keep_rows": float("nan")}},
        r"keep_rows is nan, it must be in \[0, 1\]",
    ),
    "no decomposition": ({"decomposition_options": {"rank": 8}}, r"decomposition_options is .* decomposition is None"),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_refused_with_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_the_default_is_m_smoe_at_one_half():
    # Li et al., 2024, section 3: usage picks and weighs, router logits group, permutation aligns, one global budget.
    recipe = Recipe()
    assert (recipe.keep, recipe.num_experts, recipe.layout) == (0.5, None, "mapped")
    assert (recipe.saliency, recipe.importance) == ("usage_frequency", "usage_frequency")
    assert (recipe.similarity, recipe.grouping) == ("router_logits", "dominant_experts")
    assert (recipe.alignment, recipe.merging) == ("weight_matching", "weighted_average")
    assert recipe.allocation == "global_usage"
    preset = recipe_from_preset("m-smoe")
    assert preset.preset == "m-smoe" and recipe.preset is None
    assert dataclasses.replace(preset, keep=0.5) == recipe  # the same steps; the name is gone with the change


def test_a_recipe_cannot_claim_a_preset_whose_steps_it_does_not_take():
    with pytest.raises(TypeError, match="preset"):
        Recipe(preset="frequency")


def test_the_native_layout_spreads_experts_evenly_unless_told_otherwise():
    assert Recipe(layout="native").allocation == "uniform"
    assert Recipe(layout="mapped", allocation="uniform").allocation == "uniform"


@pytest.mark.parametrize(
    "keep, slots, kept",
    [
        (0.5, 8, 4),
        (0.5, 7, 4),  # 3.5 is rounded half up
        (0.5, 5, 3),  # 2.5 as well: not to the even number, as Python's round would
        (0.25, 10, 3),  # 2.5
        (0.7, 8, 6),  # 5.6
        (0.3, 8, 2),  # 2.4
        (0.01, 8, 1),  # never none
        (1, 8, 8),
        (1.0, 1, 1),
        (0.999, 60, 60),
    ],
)
def test_the_share_that_stays_is_rounded_half_up_to_at_least_one(keep, slots, kept):
    assert Recipe(keep=keep).experts_per_layer(slots) == kept


def test_a_number_of_experts_is_taken_as_it_is():
    assert Recipe(num_experts=6).experts_per_layer(64) == 6
    assert Recipe(num_experts=6).keep is None


def test_statistics_are_the_union_of_what_the_steps_read():
    assert Recipe().statistics_needed() == {"selection_count", "logit_gram"}
    pruning = Recipe(grouping="drop", similarity=None, merging=None, alignment=None)
    assert pruning.statistics_needed() == {"selection_count"}


@pytest.mark.parametrize("rule", ["low_rank_sparse", "whitened_low_rank_sparse"])
def test_decomposition_has_the_defaults_of_the_paper(rule):
    # Li et al., 2024, section 4.1: rank 32, 10 % of the rows.
    recipe = Recipe(decomposition=rule)
    layer = find_layers(empty_model(tiny_config("qwen3_moe", hidden_size=64, moe_intermediate_size=40)))[0]
    rows = 2 * (4 * 64) + 6 * 40  # a tenth of 40 and of 64, rounded half up
    assert expert_size(layer, recipe).parameters == 3 * 32 * (40 + 64) + rows
    assert DECOMPOSITION.options(rule)["keep_rows"] == 0.1
    recipe = Recipe(decomposition=rule, decomposition_options={"rank": 8, "keep_rows": 0})
    assert expert_size(layer, recipe).parameters == 3 * 8 * (40 + 64)
    assert recipe.needs_inputs == (rule == "whitened_low_rank_sparse")
    assert "input_gram" not in recipe.statistics_needed()  # made from tokens that the layers keep, not a statistic


# --- presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe_that_names_its_source(name):
    preset, recipe = PRESETS[name], recipe_from_preset(name)
    assert recipe.preset == name
    assert preset.url.startswith("https://") and preset.paper and preset.notes
    assert all(getattr(recipe, field) == value for field, value in preset.recipe.items())
    assert recipe_from_preset(name, keep=0.25).keep == 0.25


def test_the_frequency_preset_prunes():
    recipe = recipe_from_preset("frequency")
    assert (recipe.grouping, recipe.similarity, recipe.alignment, recipe.merging) == ("drop", None, None, None)


def test_an_unknown_preset_lists_the_choices_and_the_closest_one():
    with pytest.raises(ValueError, match=r"Unknown preset 'msmoe'; choose one of \[.*'m-smoe'.*Did you mean 'm-smoe'"):
        recipe_from_preset("msmoe")


def test_an_unknown_change_to_a_preset_is_refused():
    with pytest.raises(ValueError, match=r"A recipe has no field 'kep'; it has \[.*Did you mean 'keep'"):
        recipe_from_preset("m-smoe", kep=0.5)


# --- round trips

RECIPES = {
    "default": Recipe(),
    "native": Recipe(layout="native", num_experts=4, seed=3),
    "options": Recipe(keep=0.25, similarity_options={"center": True}, allocation_options={"min_experts": 2}),
    "exclude": Recipe(exclude_layers=(0, -1, "*.3.*"), collapse_duplicates=False),
    "nothing optional": Recipe(similarity=None, grouping="drop", alignment=None, merging=None),
    "decomposed": Recipe(**LOW_RANK, decomposition_options={"rank": 8}),
    "uniform": Recipe(allocation="uniform", collapse_duplicates=True),
    **{f"preset {name}": recipe_from_preset(name, keep=0.75) for name in PRESETS},
    # Where a preset differs from the defaults, these go back to them.
    **{
        f"preset {name}, steps of the default": recipe_from_preset(
            name, **{field: getattr(Recipe(), field) for field in PRESETS[name].recipe}
        )
        for name in PRESETS
    },
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_comes_back_from_its_plain_containers(recipe):
    plain = recipe.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert recipe_from_dict(plain) == recipe
    assert recipe_from_dict(plain) == recipe


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_comes_back_from_yaml(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    assert recipe_from_yaml(path) == recipe
    assert recipe_from_yaml(str(path)) == recipe


def test_plain_containers_hold_what_was_decided_but_no_empty_option():
    assert Recipe().to_dict() == {"keep": 0.5, "layout": "mapped", "allocation": "global_usage"}


def test_a_yaml_file_may_start_from_a_preset(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: frequency\nkeep: 0.25\nexclude_layers: [0, '*.7.*']\n")
    recipe = recipe_from_yaml(path)
    assert recipe == recipe_from_preset("frequency", keep=0.25, exclude_layers=(0, "*.7.*"))


def test_an_empty_yaml_file_is_the_default(tmp_path):
    (tmp_path / "recipe.yaml").write_text("# all as usual\n")
    assert recipe_from_yaml(tmp_path / "recipe.yaml") == Recipe()


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("keap: 0.5", ValueError, r"A recipe has no field 'keap'; it has \[.*Did you mean 'keep'"),
        ("1: 0.5", ValueError, r"A recipe has no field 1"),
        ("preset: m-smoe\nkeap: 0.5", ValueError, r"A recipe has no field 'keap'.*Did you mean 'keep'"),
        ("preset: m-smo", ValueError, r"Unknown preset 'm-smo'.*Did you mean 'm-smoe'"),
        ("keep: [", ValueError, r"recipe.yaml' is not valid YAML"),
        ("merging_options:", ValueError, r"merging_options is None, it must map"),
        ("- keep: 0.5", TypeError, r"A recipe is a mapping of fields, got list"),
        ("just text", TypeError, r"A recipe is a mapping of fields, got str"),
    ],
)
def test_a_yaml_file_that_is_no_recipe_is_refused(tmp_path, text, error, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        recipe_from_yaml(path)


def test_a_missing_yaml_file_is_named_beside_the_presets(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No recipe file '.*nowhere.yaml'.*a preset: \[.*'m-smoe'"):
        recipe_from_yaml(tmp_path / "nowhere.yaml")


# --- the form itself


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().keep = 0.25


def test_every_step_has_a_field_for_its_name_and_one_for_its_options():
    for step in STEPS:
        assert {step, f"{step}_options"} <= RECIPE_FIELDS


def test_every_field_is_documented():
    documented = inspect.getdoc(Recipe)
    assert all(f"{name}: " in documented for name in RECIPE_FIELDS if not name.endswith("_options"))
