"""What the passes of a streaming run do, and that their results are those of the model in memory, byte by byte."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from all_families import tiny
from checkpoints import Killed, content, same_tensors, texts
from tiny_models import tiny_model

from hf_mcsmoe import Recipe, calibrate_moe, compress_moe, load_calibration
from hf_mcsmoe.executors import streaming_passes
from hf_mcsmoe.executors.journal import Journal
from hf_mcsmoe.executors.output_shards import OutputShards
from hf_mcsmoe.executors.streaming_model import StreamedModel
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.saliency import SALIENCY

FITTED = {"selection": "gated_obs", "refit": "least_squares", "similarity": None, "grouping": "drop", "merging": None}
NARROW = {**FITTED, "layout": "native", "alignment": None}
# Layers differ in how many experts they keep, and tokens are kept.
REFIT = {"allocation": "global_usage", "refit": "least_squares"}
EVERYWHERE = {"allocation": "joint_kmeans", "similarity": "output_cosine", "grouping": "kmeans"}


@pytest.fixture
def both(checkpoint, tokens, tmp_path):
    """`both(folder_or_model_type, recipe, ...)`: the result of streaming; it is that of the model in memory."""

    def run(model, recipe, *, data=tokens, warnings=0):
        folder = checkpoint(model) if isinstance(model, str) else model
        for executor in ("in_memory", "streaming"):
            where = {"output_dir": tmp_path / executor, "executor": executor, "progress": False}
            result = compress_moe(folder, recipe, calibration=data, **where)
            assert len(result.compression_report.warnings) == warnings
        assert same_tensors(tmp_path / "in_memory", tmp_path / "streaming")
        assert texts(tmp_path / "in_memory") == texts(tmp_path / "streaming")
        return result

    return run


@pytest.fixture
def forwards(monkeypatch):
    """Decoder layers that calibration data went through, one (index, MoE layers watched, passed on) for each time."""
    seen, original = [], StreamedModel.observe

    def observe(self, index, layers, *args, passes_on, **how):
        seen.append((index, len(layers), passes_on))
        return original(self, index, layers, *args, passes_on=passes_on, **how)

    monkeypatch.setattr(StreamedModel, "observe", observe)
    return seen


SEQUENTIAL = {
    "merging": {"sequential": True, "allocation": "uniform"},
    "refit": {**NARROW, "sequential": True},
    "ragged": {**FITTED, "sequential": True, "alignment": None},
    "global": {**REFIT, "sequential": True},
    "everywhere": {**EVERYWHERE, "sequential": True, "every_expert_tokens": 48},
    "targets": {**FITTED, "sequential": True, "alignment": None, "targets": "original_stream"},
    "global targets": {**REFIT, "sequential": True, "targets": "original_stream"},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", SEQUENTIAL.values(), ids=SEQUENTIAL)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_sequential_recipes_see_the_compressed_layers_before(model_type, changes, both, forwards):
    if changes.get("layout") == "native" and model_type != "qwen3_moe":
        pytest.skip("its configuration has no width of the experts, or one for several kinds of layers")
    result = both(model_type, Recipe(**changes))
    uniform = changes.get("allocation", "uniform") == "uniform"
    assert result.streaming_summary.passes == (1 if uniform else 2)
    moe_layers = len(result.compression_report.layers)
    last = [watched for _, watched, passes_on in forwards if not passes_on]
    assert last == [1] * moe_layers  # once for each MoE layer, and once more to pass on what the compressed one gives


def test_a_sequential_recipe_is_another_one(both, stream, checkpoint, tmp_path):
    both("qwen3_moe", Recipe(**SEQUENTIAL["ragged"]))
    stream(checkpoint("qwen3_moe"), **{**SEQUENTIAL["ragged"], "sequential": False})
    assert not same_tensors(tmp_path / "streamed", tmp_path / "streaming")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [REFIT, EVERYWHERE | {"every_expert_tokens": 48, "refit": "least_squares"}])
@pytest.mark.parametrize("has_room", [True, False])
def test_the_second_pass_runs_data_only_where_tokens_had_no_room(has_room, changes, both, forwards, monkeypatch):
    monkeypatch.setattr("hf_mcsmoe.executors.streaming.has_room_for_tokens", lambda *_: has_room)
    summary = both("mixtral", Recipe(**changes)).streaming_summary
    assert summary.passes == 2 and summary.forwards == (1 if has_room else 2)
    assert [index for index, *_ in forwards] == [*range(summary.num_decoder_layers)] * summary.forwards


def test_room_for_tokens_counts_all_layers_and_the_result(tokens, monkeypatch, tmp_path):
    layers, data = find_layers(tiny_model("mixtral").bfloat16()), load_calibration(tokens)
    # Hidden states of 32 numbers for experts and router, two slots and their weights, for each kept token.
    per_layer = (data.num_tokens + 4096) * (2 * 32 * 2 + 2 * (8 + 2))
    assert layers[0].hidden_size == 32 and layers[0].top_k == 2 and data.num_tokens < Recipe().fit_tokens
    for free, expected in ((len(layers) * per_layer + 100, True), (len(layers) * per_layer + 99, False)):
        monkeypatch.setattr(streaming_passes.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert streaming_passes.has_room_for_tokens(tmp_path, Recipe(), layers, data, 100) is expected


@pytest.mark.slow
@pytest.mark.parametrize("step", ["statistics", "budgets", "layer"])
@pytest.mark.parametrize("changes", [REFIT, *(SEQUENTIAL[name] for name in ("global", "global targets"))])
def test_both_passes_go_on_where_they_were(step, changes, checkpoint, stream, forwards, monkeypatch, tmp_path):
    folder = checkpoint("mixtral")
    stream(folder, output="expected", **changes)
    uninterrupted = len(forwards)
    forwards.clear()
    original = Journal.append

    def dying(self, record):
        original(self, record)
        if record["step"] == step:
            raise Killed

    monkeypatch.setattr(Journal, "append", dying)
    with pytest.raises(Killed):
        stream(folder, **changes)
    monkeypatch.setattr(Journal, "append", original)
    stream(folder, **changes)
    assert len(forwards) == uninterrupted  # nothing that was finished is done again
    assert content(tmp_path / "streamed") == content(tmp_path / "expected")
    assert texts(tmp_path / "streamed") == texts(tmp_path / "expected")


def test_the_working_folder_holds_no_pickle_and_forgets_what_was_used(checkpoint, stream, monkeypatch, tmp_path):
    original, calls = OutputShards.write, itertools.count()

    def dying(*args):
        if next(calls) == 1:
            raise Killed
        return original(*args)

    monkeypatch.setattr(OutputShards, "write", dying)
    with pytest.raises(Killed):
        stream(checkpoint("mixtral"), **REFIT)
    files = {file.name for file in (tmp_path / "streamed.partial").iterdir() if file.is_file()}
    assert {name.rpartition(".")[2] for name in files} <= {"safetensors", "json", "jsonl", "bin"}
    assert not any(name.startswith("layer-00000") for name in files)  # it is compressed
    assert any(name.startswith("layer-00001.tokens") for name in files)


@pytest.mark.slow
@pytest.mark.parametrize("has_images", [False, True])
@pytest.mark.parametrize("changes", [{"allocation": "uniform"}, {"sequential": True, "allocation": "uniform"}, {}])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_layer_that_no_token_reached_is_left_as_it_is(changes, has_images, both, tmp_path):
    tiny("ernie4_5_vl_moe_text").save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 130, (10, 9), generator=torch.Generator().manual_seed(0))
    marks = (torch.arange(9) < 4).long().expand(10, -1)
    data = [{"input_ids": ids, "moe_mm_token_type_ids": marks}] if has_images else ids
    result = both(tmp_path / "model", Recipe(**changes), data=data, warnings=0 if has_images else 1)
    reports = result.compression_report.layers
    assert any("vision_moe" in report.layer for report in reports) == has_images
    if not has_images:
        assert "vision_moe.experts'" in result.compression_report.warnings[0]


@pytest.mark.parametrize("allocation", ["uniform", "global_usage"])
@pytest.mark.parametrize("executor", ["in_memory", "streaming"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_if_no_token_reached_any_layer_it_is_an_error(executor, allocation, tmp_path):
    tiny("ernie4_5_vl_moe_text").save_pretrained(tmp_path / "model")
    recipe = Recipe(allocation=allocation, exclude_layers=["*text_moe*"])
    ids = torch.randint(0, 130, (10, 9), generator=torch.Generator().manual_seed(0))
    where = {"output_dir": tmp_path / "out", "executor": executor, "progress": False}
    with pytest.raises(ValueError, match=r"No calibration token reached 'layers\.1\.mlp\.vision_moe.*exclude_layers"):
        compress_moe(tmp_path / "model", recipe, calibration=ids, **where)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def saved(checkpoint, tokens, tmp_path):
    """The folder of a model and that of its saved statistics, which serve several recipes."""
    recipes = [Recipe(**changes) for changes in SAVED.values()]
    calibrate_moe(checkpoint("mixtral"), recipes, tmp_path / "stats", calibration=tokens, progress=False)
    return checkpoint("mixtral"), tmp_path / "stats"


SAVED = {
    "uniform": {"allocation": "uniform"},
    "global": REFIT,
    "ragged": {**FITTED, "alignment": None},
    "weights": {"allocation": "global_usage", "saliency": "reads_weights"},
    "protected": {"protect": "super_experts", "grouping": "drop", "merging": None, "allocation": "uniform"},
}


@pytest.fixture(autouse=True)
def saliency_of_weights(monkeypatch):
    """A saliency that reads the weights, as "left_out" does, and that an allocation can compare across layers."""

    def norms(statistics, weights):  # noqa: ARG001
        return weights.up.double().norm(dim=(1, 2))

    monkeypatch.setitem(SALIENCY._entries, "reads_weights", norms)
    monkeypatch.setitem(SALIENCY._needs, "reads_weights", frozenset({"weights"}))
    monkeypatch.setitem(SALIENCY._traits, "reads_weights", {})


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_saved_statistics_are_streamed_without_a_forward(name, saved, both, forwards, tokens, tmp_path):
    folder, statistics = saved
    result = both(folder, Recipe(**SAVED[name]), data=statistics)
    assert not forwards and result.streaming_summary.forwards == 0
    assert result.streaming_summary.passes == (2 if name == "weights" else 1)
    direct = {"output_dir": tmp_path / "direct", "executor": "in_memory", "progress": False}
    compress_moe(folder, Recipe(**SAVED[name]), calibration=tokens, **direct)
    assert same_tensors(tmp_path / "direct", tmp_path / "streaming")


def test_saved_statistics_of_another_model_are_refused_and_nothing_is_left(saved, tmp_path):
    model = copy.deepcopy(tiny_model("mixtral")).bfloat16()
    with torch.no_grad():
        next(iter(find_layers(model)[1].expert_parameters.values()))[5, 0, 0] += 1.0
    model.save_pretrained(tmp_path / "other")
    where = {"output_dir": tmp_path / "out", "executor": "streaming", "progress": False}
    how = {"calibration": saved[1], **where}
    with pytest.raises(ValueError, match=r"are of another model: layers\.model\.layers\.1\..* Calibrate this one"):
        compress_moe(tmp_path / "other", Recipe(**SAVED["uniform"]), **how)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match=r"are of another model: config\.rms_norm_eps was"):
        compress_moe(tmp_path / "other", Recipe(**SAVED["uniform"]), **how)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (recipe_from_preset("heapr", keep=0.5), "needs gradients of the loss"),
        (recipe_from_preset("m-smoe-fisher", keep=0.5), "needs gradients of the loss"),
    ],
)
def test_recipes_that_need_the_whole_model_are_loaded_and_it_is_said(
    recipe, reason, checkpoint, tokens, monkeypatch, tmp_path
):
    said = []
    monkeypatch.setattr("hf_mcsmoe.executors.streaming_choice.logger.warning", said.append)
    for name, executor in (("streamed", "auto"), ("loaded", "in_memory")):
        where = {"output_dir": tmp_path / name, "executor": executor, "progress": False}
        compress_moe(checkpoint("mixtral"), recipe, calibration=tokens, **where)
    assert len(said) == 1 and f"cannot be streamed: its recipe {reason}" in said[0]
    assert same_tensors(tmp_path / "streamed", tmp_path / "loaded")
    assert not list(tmp_path.glob("*.partial"))
