"""One contract that every MoE family of transformers with the standard call of the experts fulfils."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from all_families import STANDARD, TINY, VOCABULARY, every_run_or_slow, logits, named_class, tiny
from torch.testing import assert_close
from typer.testing import CliRunner

from hf_mcsmoe import Recipe, compress_moe, family_table, load_calibration, plan
from hf_mcsmoe.allocation import ALLOCATION
from hf_mcsmoe.cli import app
from hf_mcsmoe.executors.in_memory import collect_statistics
from hf_mcsmoe.families import find_layers, tied_layers
from hf_mcsmoe.family_table import describe_family, insert, read_table, render
from hf_mcsmoe.grouping import GROUPING
from hf_mcsmoe.loading import load_model
from hf_mcsmoe.modeling.experts import install_native
from hf_mcsmoe.types import ExpertGroups

README = Path(__file__).parent.parent / "README.md"
LEADERS, TWINS = [1, 2, 4, 7], [0, 3, 5, 6]
IDS = torch.randint(3, VOCABULARY, (10, 9), generator=torch.Generator().manual_seed(0))
PROMPT = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
# The native layout counts all experts of a configuration together. Experts for images see no text:
# those of dots3_note have a count of their own and are left out, Ernie's need tokens marked as images.
EXCLUDED = {"dots3_note": ["*vision_tower*"], "qwen3_omni_moe": ["talker.*"]}
IMAGE_MARKS = {"ernie4_5_vl_moe": "moe_mm_token_type_ids", "ernie4_5_vl_moe_text": "moe_mm_token_type_ids"}
SEES_NO_TEXT = ("dots3_note", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "qwen3_omni_moe")
DROP = {"grouping": "drop", "alignment": None, "merging": None}
UNUSED_WARNING = "No calibration token reached"

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
every_family = pytest.mark.parametrize("key", every_run_or_slow(STANDARD))
# The talker of Qwen3-Omni continues what the thinker said, not token ids; it is part of qwen3_omni_moe.
GENERATING = [key for key in STANDARD if named_class(TINY[key]["model"]).can_generate() and "Talker" not in key]
GENERATE = {
    "qwen3_omni_moe": {"return_audio": False, "thinker_max_new_tokens": 3},
    "diffusion_gemma": {"max_denoising_steps": 2},
}
every_generating_family = pytest.mark.parametrize("key", every_run_or_slow(GENERATING))


@pytest.fixture(scope="module", autouse=True)
def steps_of_these_tests():
    """A grouping that makes pairs of `LEADERS` and `TWINS`, and an allocation that differs between layers."""

    def pairs(saliency, similarity, num_groups, num_partitions=1):  # noqa: ARG001
        group_of_expert = torch.empty(8, dtype=torch.int64)
        group_of_expert[LEADERS] = group_of_expert[TWINS] = torch.arange(4)
        return ExpertGroups(group_of_expert, torch.tensor(LEADERS))

    def staircase(saliency_of_layer, budget_of_layer):  # noqa: ARG001
        return [3 + place % 4 for place in range(len(budget_of_layer))]

    with pytest.MonkeyPatch.context() as patch:
        for registry, name, step in ((GROUPING, "pairs", pairs), (ALLOCATION, "staircase", staircase)):
            patch.setitem(registry._entries, name, step)
            patch.setitem(registry._needs, name, frozenset())
        yield


def calibration(key, layout):
    """Token ids; for the native layout of models that route images apart, some are marked as images."""
    if layout == "mapped" or key not in IMAGE_MARKS:
        return load_calibration(IDS, batch_size=5)
    marks = (torch.arange(9) < 4).long().expand(5, -1)
    return load_calibration([{"input_ids": ids, IMAGE_MARKS[key]: marks} for ids in IDS.split(5)])


def compress(model, key, layout, **recipe):
    """`model` after M-SMoE with half of its experts, in place."""
    recipe = {"keep": 0.5, "allocation": "uniform", **recipe}
    if layout == "native":
        recipe["exclude_layers"] = EXCLUDED.get(key, [])
    request = Recipe(layout=layout, **recipe)
    return compress_moe(model, request, calibration=calibration(key, layout), progress=False)


@functools.cache
def compressed(key, layout):
    """The compressed tiny model; mapped with another number of experts in each layer. Shared: do not change it."""
    recipe = {"allocation": "staircase"} if layout == "mapped" else {}
    return compress(copy.deepcopy(tiny(key)), key, layout, **recipe)


@functools.cache
def before(key):
    with torch.no_grad():
        return logits(tiny(key), PROMPT)


def reached(key, layout):
    """The layers that calibration with text (native: and images) reaches, those that share experts left out."""
    layers = find_layers(tiny(key))
    tied = tied_layers(layers)
    if layout == "mapped" or key in EXCLUDED:
        layers = [layer for layer in layers if "vision" not in layer.name and not layer.name.startswith("talker.")]
    return [layer for layer in layers if layer.name not in tied]


@every_family
def test_layers_are_found_and_every_selection_with_weight_is_counted(key):
    model = copy.deepcopy(tiny(key))
    layers = find_layers(model)
    assert layers and all(layer.num_slots == 8 or "vision_tower" in layer.name for layer in layers)
    assert not any("shared" in layer.name for layer in layers)
    counted = {layer.name: torch.zeros(layer.num_slots, dtype=torch.int64) for layer in layers}
    possible = dict.fromkeys(counted, 0)

    def watch(layer):
        def count(_, args, kwargs):
            _, slots, weights = (*args, *kwargs.values())[:3]
            for slot, weight in zip(slots.flatten().tolist(), weights.flatten().tolist(), strict=True):
                possible[layer.name] += 1
                if weight != 0 and slot < layer.num_slots:
                    counted[layer.name][slot] += 1

        layer.experts.register_forward_pre_hook(count, with_kwargs=True)

    for layer in layers:
        watch(layer)
    data = load_calibration(IDS, batch_size=5, held_out_fraction=0)
    statistics, _ = collect_statistics(model, layers, data, frozenset({"logit_gram"}), progress=False)
    assert statistics
    for first in [layer for layer in layers if layer.name in statistics]:
        together = [layer.name for layer in layers if tied_layers(layers).get(layer.name, layer) is first]
        assert torch.equal(statistics[first.name].selection_count, sum(counted[name] for name in together))
        slots = sum(possible[name] for name in together)
        assert slots == first.top_k * statistics[first.name].num_tokens
        is_passive = first.num_passive_rows and "inkling" not in key  # Inkling's are shared experts
        total = statistics[first.name].selection_count.sum()
        assert 0 < total <= slots if is_passive else total == slots
        assert statistics[first.name]["logit_gram"].shape == (first.num_slots, first.num_slots)


@pytest.mark.parametrize("layout", ["mapped", "native"])
@every_family
def test_keeping_all_experts_is_bit_identical(key, layout):
    model = compress(copy.deepcopy(tiny(key)), key, layout, keep=1.0)
    with torch.no_grad():
        assert torch.equal(logits(model, PROMPT), before(key))


@every_family
def test_mapped_layers_may_keep_different_numbers_of_experts(key):
    model = compressed(key, "mapped")
    names = [layer.name for layer in reached(key, "mapped")]
    assert [report.layer for report in model.compression_report.layers] == names
    found = {layer.name: layer for layer in find_layers(model)}
    for place, name in enumerate(names):
        assert found[name].num_experts == 3 + place % 4
        assert found[name].num_slots == 8
    for layer in find_layers(tiny(key)):
        if layer.name not in names and not tied_layers(find_layers(tiny(key))):
            for name, parameter in layer.expert_parameters.items():
                assert torch.equal(found[layer.name].experts.get_parameter(name), parameter)
    warnings = model.compression_report.warnings
    assert [text.startswith(UNUSED_WARNING) for text in warnings] == ([True] if key in SEES_NO_TEXT else [])
    with torch.no_grad():
        assert not torch.equal(logits(model, PROMPT), before(key))


@every_family
def test_the_native_layout_keeps_the_rows_of_the_leaders_and_nothing_else(key):
    original, model = tiny(key), compressed(key, "native")
    assert type(model) is type(original)
    reports = {report.layer: report for report in model.compression_report.layers}
    assert list(reports) == [layer.name for layer in reached(key, "native")]
    state, expected = model.state_dict(), original.state_dict()
    assert list(state) == list(expected)
    planned = plan(original, Recipe(keep=0.5, layout="native", exclude_layers=EXCLUDED.get(key, [])))
    assert planned.total_parameters_after == model.compression_report.total_parameters_after
    for old in [layer for layer in find_layers(original) if layer.name in reports]:
        rows = torch.tensor(reports[old.name].dominant_of_group)
        groups = torch.tensor(reports[old.name].group_of_expert)
        sizes = {8: rows, 8 + old.num_passive_rows: torch.cat([rows, 8 + torch.arange(old.num_passive_rows)])}
        for name in [name for name in state if name.startswith(f"{old.block_name}.")]:
            if name.startswith(old.name):
                assert state[name].dim() < 2 or len(state[name]) == 4 + old.num_identity_slots * ("gate_up" in name)
            elif name.endswith("tid2eid"):
                assert torch.equal(state[name], groups[expected[name]])
            elif state[name].shape != expected[name].shape:
                axis = 0 if len(expected[name]) > 1 else 1
                assert torch.equal(state[name], expected[name].index_select(axis, sizes[expected[name].shape[axis]]))
            else:
                assert torch.equal(state[name], expected[name])


@pytest.mark.parametrize("layout", ["mapped", "native"])
@every_family
def test_saving_and_loading_again(key, layout, tmp_path):
    model = compressed(key, layout)
    model.save_pretrained(tmp_path)
    if layout == "mapped":
        again, info = load_model(tmp_path, output_loading_info=True)
    else:
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(logits(again.eval(), PROMPT), logits(model, PROMPT))


@every_family
def test_planted_twins_with_shuffled_neurons_merge_without_loss(key):
    model = copy.deepcopy(tiny(key))
    layers = reached(key, "mapped")
    layers = [layer for layer in find_layers(model) if layer.name in {x.name for x in layers}]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in layers:
            for tensor in layer.expert_parameters.values():
                tensor[TWINS] = tensor[LEADERS]
        expected = logits(model, PROMPT)
        for layer in layers:
            weights = layer.family.view(layer, layer.expert_parameters)
            order = torch.rand(weights.num_experts, weights.width, generator=generator).argsort(dim=1)
            for name, shuffled in weights.permute_neurons(order).tensors().items():
                getattr(weights, name).copy_(shuffled)
        scale = expected.abs().max().item()
        assert_close(logits(model, PROMPT), expected, rtol=1e-4, atol=1e-5 * scale)
        result = compress(model, key, "mapped", grouping="pairs")
        assert all(report.num_experts_after == 4 for report in result.compression_report.layers)
        assert_close(logits(result, PROMPT), expected, rtol=1e-4, atol=1e-5 * scale)


@every_family
def test_two_steps_of_training_change_the_merged_experts(key):
    model = copy.deepcopy(compressed(key, "mapped"))
    names = {report.layer for report in model.compression_report.layers}
    layers = [layer for layer in find_layers(model) if layer.name in names]
    parameters = [parameter for layer in layers for parameter in layer.expert_parameters.values()]
    old = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        logits(model, PROMPT).float().square().mean().backward()
        optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in parameters)
    for one, was in zip(parameters, old, strict=True):
        assert not torch.equal(one, was)


@pytest.mark.parametrize("layout", ["mapped", "native"])
@every_generating_family
def test_generating_starts_with_the_most_likely_token_and_goes_on(key, layout):
    model = compressed(key, layout)
    new = model.generate(input_ids=PROMPT[:1], max_new_tokens=3, do_sample=False, **GENERATE.get(key, {}))
    new = new.sequences if hasattr(new, "sequences") else new
    assert new.shape[0] == 1 and new.shape[1] > PROMPT.shape[1]
    assert torch.equal(new[:, : PROMPT.shape[1]], PROMPT[:1])
    if key != "diffusion_gemma":  # it starts from random tokens
        with torch.no_grad():
            assert new[0, PROMPT.shape[1]] == logits(model, PROMPT[:1])[0, -1].argmax()


@pytest.mark.parametrize("key", ["mixtral", "gpt_oss", "deepseek_v3", "gemma4_text", "lfm2_moe"])
def test_a_forward_with_weights_on_disk(key, tmp_path):
    compressed(key, "mapped").save_pretrained(tmp_path / "model")
    limits = {"device_map": "auto", "max_memory": {"cpu": "120KB"}, "offload_folder": tmp_path / "offload"}
    model = load_model(tmp_path / "model", **limits)
    assert "disk" in model.hf_device_map.values()
    with torch.no_grad():
        assert torch.equal(logits(model, PROMPT), logits(compressed(key, "mapped"), PROMPT))


def directory(key):
    return TINY[key]["model"].split(".")[2]


def test_every_family_is_in_the_list():
    assert len(set(map(directory, STANDARD))) == 66
    assert [row["family"] for row in read_table()] == sorted(set(map(directory, TINY)))


@pytest.mark.parametrize("family", sorted(set(map(directory, TINY))))
def test_the_table_says_what_the_code_finds(family):
    row = next(row for row in read_table() if row["family"] == family)
    assert describe_family([tiny(key) for key in TINY if directory(key) == family]) == row


def test_the_readme_holds_the_table():
    text = README.read_text(encoding="utf-8")
    assert "<!-- families:start -->" in text and insert(text, render(read_table())) == text


def test_a_readme_without_markers_gets_them():
    assert insert("# Title\n", "| a |") == "# Title\n\n<!-- families:start -->\n| a |\n<!-- families:end -->\n"


def test_the_table_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(family_table, "TABLE", tmp_path / "table.json")
    (tmp_path / "some.json").write_text(json.dumps({"mixtral": TINY["mixtral"]}), encoding="utf-8")
    (tmp_path / "README.md").write_text("", encoding="utf-8")
    family_table.main(["--measure", str(tmp_path / "some.json"), "--write", str(tmp_path / "README.md")])
    assert "| mixtral | `mixtral` | mapped, native |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_command_line_prints_the_table():
    shown = CliRunner().invoke(app, ["families", "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout) == read_table()
    shown = CliRunner().invoke(app, ["families", "mixtral"])
    assert shown.exit_code == 0 and "mapped, native" in shown.stdout and "olmoe" not in shown.stdout
    shown = CliRunner().invoke(app, ["families", "mixtrel"])
    assert shown.exit_code == 2 and "Did you mean 'mixtral'?" in shown.stderr


def test_native_needs_tokens_for_all_experts_that_one_number_counts():
    model = copy.deepcopy(tiny("ernie4_5_vl_moe_text"))
    recipe = Recipe(keep=0.5, layout="native")
    with pytest.raises(ValueError, match=r"No calibration token reached.*vision_moe.*or use layout='mapped'"):
        compress_moe(model, recipe, calibration=load_calibration(IDS), progress=False)


@pytest.mark.parametrize(
    ("key", "pattern", "message"),
    [
        ("ernie4_5_vl_moe_text", "*vision_moe*", "cannot say that .* while 'layers.1.mlp.vision_moe.experts' keeps 8"),
        ("mixtral", "*layers.0.*", "cannot say that .* while 'model.layers.0.mlp.experts' keeps 8"),
    ],
)
def test_native_refuses_to_leave_out_what_the_same_number_counts(key, pattern, message):
    recipe = Recipe(keep=0.5, layout="native", exclude_layers=[pattern])
    with pytest.raises(ValueError, match=message + ".*Use layout='mapped'"):
        compress_moe(copy.deepcopy(tiny(key)), recipe, calibration=load_calibration(IDS), progress=False)


@pytest.mark.parametrize("key", ["deepseek_v4", "longcat_flash", "zaya", "inkling_text", "gpt_oss"])
def test_dropped_experts_add_nothing_beside_special_routing(key):
    result = compress(copy.deepcopy(tiny(key)), key, "mapped", similarity=None, **DROP)
    zeroed = copy.deepcopy(tiny(key))
    for layer, report in zip(find_layers(zeroed), result.compression_report.layers, strict=True):
        dropped = torch.tensor(report.group_of_expert) < 0
        assert dropped.sum() == 4
        with torch.no_grad():
            for name, parameter in layer.expert_parameters.items():
                if name.startswith("down_proj"):
                    parameter[dropped] = 0
    with torch.no_grad():
        expected = logits(zeroed, PROMPT)
        assert_close(logits(result, PROMPT), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_native_refuses_to_drop_what_a_table_names():
    recipe = Recipe(keep=0.5, layout="native", similarity=None, **DROP)
    with pytest.raises(ValueError, match=r"Dropped experts leave none for .* in tid2eid.*Use layout='mapped'"):
        compress_moe(copy.deepcopy(tiny("deepseek_v4")), recipe, calibration=load_calibration(IDS), progress=False)
    layer = find_layers(copy.deepcopy(tiny("deepseek_v4")))[0]
    rows, group_of_expert = torch.tensor([0, 1]), torch.tensor([0, 1, -1, -1, -1, -1, -1, -1])
    with pytest.raises(ValueError, match=r"tid2eid of .* names experts that were dropped. Use layout='mapped'"):
        install_native(layer, {}, rows, group_of_expert)


def test_native_refuses_what_the_configuration_does_not_accept(monkeypatch):
    model = copy.deepcopy(tiny("mixtral"))

    def refuse(config):  # noqa: ARG001
        raise ValueError("8 or nothing")

    monkeypatch.setattr(type(model), "_from_config", refuse)
    with pytest.raises(ValueError, match=r"cannot be built with 4 experts: 8 or nothing\. Use layout='mapped'"):
        plan(model, Recipe(keep=0.5, layout="native"))


def test_tokens_that_padding_hides_among_others_are_refused():
    rows = [[3, 4, 5, 6], [7, 8]]
    data = load_calibration(rows, batch_size=2, held_out_fraction=0)
    with pytest.raises(ValueError, match=r"given 16 tokens for a batch of 8.*rows of one length, unpadded"):
        compress_moe(copy.deepcopy(tiny("diffusion_gemma")), Recipe(keep=0.5), calibration=data, progress=False)
