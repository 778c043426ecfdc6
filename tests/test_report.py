"""What compression_report.json and the statistics beside it hold, whoever writes and whoever reads them."""

import builtins
import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from synthetic_reports import synthetic_report

from hf_mcsmoe import Recipe, compress_moe, peak_memory
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.executors.in_memory import collect_statistics
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.publishing import STATISTICS_FILE, read_report, read_statistics, write_report, write_statistics
from hf_mcsmoe.recipe_reading import recipe_from_dict, recipe_from_preset
from hf_mcsmoe.types import CompressionReport

# What reports had before these fields were added.
NEW_IN_LAYER = ("width_before", "rank", "sparse_rows")
NEW = ("peak_memory", "tried", "active_parameters_before", "active_parameters_after")


def older(report):
    """The report as an earlier version wrote it: of the same format, without what was added since."""
    values = {name: value for name, value in report.to_dict().items() if name not in NEW}
    values["layers"] = [
        {name: value for name, value in layer.items() if name not in NEW_IN_LAYER} for layer in values["layers"]
    ]
    return values


def test_a_report_survives_its_file(tmp_path):
    report = synthetic_report(3, 6)
    write_report(report, tmp_path)
    again = CompressionReport.from_dict(read_report(tmp_path))
    assert again == report and dataclasses.replace(report, seconds=0.0) != again
    found = read_statistics(tmp_path)
    assert found.keys() == report.statistics.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in report.statistics.items())


def test_statistics_are_no_part_of_the_json(tmp_path):
    report = synthetic_report(48, 128)
    write_report(report, tmp_path)
    assert "statistics" not in report.to_dict() and "statistics" not in read_report(tmp_path)
    assert (tmp_path / "compression_report.json").stat().st_size < 300_000
    size = (tmp_path / STATISTICS_FILE).stat().st_size
    arrays = 48 * (128 * 128 * 4 + 128 * 8)
    assert arrays < size < arrays + 20_000


def test_an_older_report_is_read_and_written_again(tmp_path):
    values = older(synthetic_report(2, 4))
    assert values["format_version"] == 1
    write_report(values, tmp_path)
    report = CompressionReport.from_dict(read_report(tmp_path))
    assert report.peak_memory is None and report.tried == []
    assert [layer.width_before for layer in report.layers] == [None, None]
    assert read_statistics(tmp_path) == {} and not (tmp_path / STATISTICS_FILE).exists()


def test_keys_of_later_versions_are_passed_over():
    report = synthetic_report(1, 4)
    values = report.to_dict()
    values["invented_later"] = values["layers"][0]["invented_later"] = 1
    assert CompressionReport.from_dict(values) == report


def test_the_same_statistics_are_the_same_bytes(tmp_path):
    statistics = synthetic_report(2, 4).statistics
    for name, one in (("a", statistics), ("b", dict(reversed(statistics.items())))):
        (tmp_path / name).mkdir()
        write_statistics(one, tmp_path / name)
    assert (tmp_path / "a" / STATISTICS_FILE).read_bytes() == (tmp_path / "b" / STATISTICS_FILE).read_bytes()
    with safe_open(tmp_path / "a" / STATISTICS_FILE, "pt") as file:
        assert file.metadata() == {"format_version": "1"}


def test_damaged_statistics_are_refused(tmp_path):
    write_report(synthetic_report(1, 4), tmp_path)
    path = tmp_path / STATISTICS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"compression_statistics.safetensors' is damaged.*Delete it, or compress"):
        read_statistics(tmp_path)


@pytest.mark.parametrize("preset", ["m-smoe", "frequency"])
def test_counts_and_similarities_of_the_calibration_tokens_are_recorded(preset, original, compress, tokens):
    model, recipe = original("qwen3_moe"), recipe_from_preset(preset)
    layer = find_layers(model)[1].name
    data = load_calibration(tokens, None, seed=recipe.seed)
    needs = frozenset({"logit_gram"})
    statistics = collect_statistics(model, find_layers(model), data, needs, progress=False)[0][layer]
    recorded = compress(model, preset=preset).compression_report.statistics
    count = recorded[f"{layer}.selection_count"]
    assert count.dtype == torch.int64 and torch.equal(count, statistics.selection_count)
    assert count.sum() == 2 * statistics.num_tokens
    if recipe.similarity is None:
        assert {name.split(".")[-1] for name in recorded} == {"selection_count"}
        return
    gram, similarity = statistics["logit_gram"], recorded[f"{layer}.similarity"]
    norm = gram.diagonal().sqrt()
    assert similarity.dtype == torch.float32 and similarity.shape == (8, 8)
    assert torch.allclose(similarity.double(), gram / norm[:, None] / norm, atol=1e-6)


@pytest.mark.parametrize("changes", [{"allocation": "uniform"}, {"allocation": "global_usage"}], ids=str)
def test_both_executors_leave_the_same_statistics(changes, checkpoint, tokens, tmp_path):
    for executor in ("in_memory", "streaming"):
        where = {"output_dir": tmp_path / executor, "executor": executor}
        model = compress_moe(
            checkpoint("qwen3_moe"), Recipe(keep=0.5, **changes), calibration=tokens, progress=False, **where
        )
        report = model.compression_report
        assert report.statistics.keys() == read_statistics(tmp_path / executor).keys()
        for layer in report.layers:
            count = report.statistics[f"{layer.layer}.selection_count"]
            assert (count / count.sum()).tolist() == pytest.approx(layer.usage_frequency)
            assert report.statistics[f"{layer.layer}.similarity"].diagonal().tolist() == [1.0] * 8
    one, other = ((tmp_path / executor / STATISTICS_FILE).read_bytes() for executor in ("in_memory", "streaming"))
    assert one == other


def test_the_recipe_in_a_report_does_not_rest_on_defaults(compressed):
    report = compressed("qwen3_moe", "mapped").compression_report
    assert report.recipe["merging"] == "weighted_average" and report.recipe["seed"] == 0
    assert recipe_from_dict(json.loads(json.dumps(report.recipe))) == recipe_from_preset("m-smoe")


def test_widths_and_ranks_are_in_the_report(compress):
    (layer, *_) = compress("qwen3_moe").compression_report.layers
    assert layer.width_before == 24 and set(layer.widths) == {24}
    assert layer.rank is None and layer.sparse_rows is None
    options = {"rank": 3, "keep_rows": 0.25}
    model = compress("qwen3_moe", decomposition="low_rank_sparse", decomposition_options=options)
    for layer in model.compression_report.layers:
        # A quarter of the 24 rows of gate and of up, and of the 32 of down.
        assert (layer.rank, layer.sparse_rows) == (3, layer.num_experts_after * (6 + 6 + 8))


def test_the_peak_of_this_process_is_in_the_report(compressed):
    report = compressed("qwen3_moe", "mapped").compression_report
    now = peak_memory.peak_process_bytes()
    assert 50_000_000 < report.peak_memory["process"] <= now


def test_the_peak_comes_from_linux_or_else_from_getrusage(monkeypatch, tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t 9 kB\nVmHWM:\t  1234 kB\nVmRSS:\t 7 kB\n")
    monkeypatch.setattr(peak_memory, "LINUX_STATUS", status)
    assert peak_memory.peak_process_bytes() == 1234 * 1024

    resource = pytest.importorskip("resource")
    monkeypatch.setattr(peak_memory, "LINUX_STATUS", tmp_path / "none")
    usage = type("Usage", (), {"ru_maxrss": 5000})
    monkeypatch.setattr(resource, "getrusage", lambda _: usage)
    for platform, expected in (("linux", 5000 * 1024), ("darwin", 5000)):
        monkeypatch.setattr(peak_memory.sys, "platform", platform)
        assert peak_memory.peak_process_bytes() == expected


def test_a_system_that_does_not_tell_its_peak_gives_none(monkeypatch, tmp_path):
    original = builtins.__import__

    def without_resource(name, *args, **kwargs):
        if name == "resource":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(peak_memory, "LINUX_STATUS", tmp_path / "none")
    monkeypatch.setattr(builtins, "__import__", without_resource)
    assert peak_memory.peak_memory() == {"process": None}


def test_devices_that_were_used_have_a_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: [70, 0, 90][device])
    assert list(peak_memory.peak_memory().items())[1:] == [("cuda:0", 70), ("cuda:2", 90)]
