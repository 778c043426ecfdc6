"""The second stage of MC-SMoE by the command line: decompose, prune rows while training, write what is left."""

import json
import math

import pytest
import torch
from distillation import reference_means
from safetensors.torch import load_file
from test_recover_cli import data, fail, folders, recover, succeed  # noqa: F401
from transformers import AutoModelForCausalLM, Trainer

from hf_mcsmoe.loading import empty_model, load_model, read_config
from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.training import sparse_parts
from hf_mcsmoe.training.recovery import working_folder
from hf_mcsmoe.training.recovery_data import load_recovery_data
from hf_mcsmoe.training.recovery_pruning import RowPruning
from hf_mcsmoe.training.row_pruner import count_rows

EXPERTS = 3 * 2  # experts of the student: 2 in each of 3 layers, on average
TOTAL_ROWS = EXPERTS * (24 + 24 + 32)
PRUNE = ("--final-keep-rows", "0.2", "--rank", "4", "--initial-warmup", "1", "--final-warmup", "3")


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module")
def pruned(folders, data, tmp_path_factory):  # noqa: F811
    """(the folder of a student whose rows were pruned, what was printed)."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    words = ("--num-train-epochs", "2", "--teacher-dtype", "float32", "--task-weight", "0")
    return folder, succeed(*recover(folders, data, folder, *PRUNE, *words))


def test_rows_are_pruned_and_the_reports_say_so(folders, data, pruned):  # noqa: F811
    folder, text = pruned
    kept = math.floor(0.2 * TOTAL_ROWS + 0.5)
    assert f"factors of rank 4, {kept} rows kept (20.0%)" in text and "import hf_mcsmoe" in text
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and count_rows(model) == TOTAL_ROWS
    parts = sparse_parts(model).values()
    assert sum(part.row.numel() for part in parts) == kept
    assert all((part.parameter != 0).any(1).all() for part in parts)
    assert {experts.layout()["rank"] for experts in form_layers(model).values()} == {4}
    report = json.loads((folder / "recovery_report.json").read_text())
    assert report["row_pruning"] == {
        "final_keep_rows": 0.2,
        "rank": 4,
        "initial_warmup": 1.0,
        "final_warmup": 3.0,
        "rows": TOTAL_ROWS,
        "kept_rows": kept,
    }
    assert f"factors of rank 4 plus {kept} of {TOTAL_ROWS} rows" in (folder / "README.md").read_text()
    # Decomposing with all rows changes nothing: the losses before are those of the merged model.
    student, teacher = (AutoModelForCausalLM.from_pretrained(one, dtype="float32") for one in folders)
    held_out = load_recovery_data(data, None, "causal").held_out
    for one, name in ((student, "held_out_before"), (model.float(), "held_out_after")):
        loss, kl, _ = reference_means(one, teacher, "causal", held_out, temperature=2.0)
        assert report[name]["loss_task"] == pytest.approx(loss, rel=1e-5)
        assert report[name]["kl"] == pytest.approx(kl, rel=1e-3)


def test_sizes_in_the_report_are_those_of_the_file(folders, pruned):  # noqa: F811
    before, report = (json.loads((one / "compression_report.json").read_text()) for one in (folders[0], pruned[0]))
    stored = load_file(pruned[0] / "model.safetensors")
    model = load_model(pruned[0])
    parameters = list(model.parameters())
    assert report["total_parameters_after"] == sum(p.numel() for p in parameters) < before["total_parameters_after"]
    assert report["total_bytes_after"] == bytes_of(parameters)
    assert report["total_bytes_before"] == before["total_bytes_before"]
    for layer in report["layers"]:
        tensors = {name: t for name, t in stored.items() if name.startswith(f"{layer['layer']}.")}
        own = [t for name, t in tensors.items() if "offsets" not in name and "expert_map" not in name]
        assert layer["bytes_after"] == bytes_of(own)
        assert layer["parameters_after"] == sum(t.numel() for t in own if t.is_floating_point())
        assert layer["rank"] == 4
    pruning = report["recovery"]["row_pruning"]
    assert pruning["rank"] == 4 and sum(layer["sparse_rows"] for layer in report["layers"]) == pruning["kept_rows"]


@pytest.mark.slow
def test_an_interrupted_pruning_is_resumed_to_equal_bits(folders, data, tmp_path, monkeypatch):  # noqa: F811
    succeed(*recover(folders, data, tmp_path / "whole", *PRUNE))
    step = Trainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise OSError("the power went off")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop)
    again = recover(folders, data, tmp_path / "again", *PRUNE)
    fail("the power went off", *again)
    monkeypatch.undo()
    assert (working_folder(tmp_path / "again") / "checkpoint-4").is_dir()
    fail("had another row_pruning", *recover(folders, data, tmp_path / "again"), "--resume")
    fail("had another row_pruning", *again, "--resume", "--final-keep-rows", "0.3")
    succeed(*again, "--resume")
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_decomposed_experts_are_trained_on(pruned, folders, data, tmp_path):  # noqa: F811
    # What was pruned can be recovered further, and lose more rows, but none come back.
    again = (pruned[0], folders[1])
    succeed(*recover(again, data, tmp_path / "out", "--final-keep-rows", "0.1", "--max-steps", "8"))
    model = load_model(tmp_path / "out")
    kept = sum(part.row.numel() for part in sparse_parts(model).values())
    assert kept == math.floor(0.1 * TOTAL_ROWS + 0.5)
    report = json.loads((tmp_path / "out" / "compression_report.json").read_text())
    assert report["recovery"]["row_pruning"]["kept_rows"] == kept
    assert report["recovery"]["earlier"]["row_pruning"]["final_keep_rows"] == 0.2
    fail("final_keep_rows is 0.5, but of 480 rows only 96 are stored", *recover(again, data, tmp_path / "x"),
         "--final-keep-rows", "0.5")  # fmt: skip
    fail(
        "rank is 4, but the experts are decomposed already, with rank 4", *recover(again, data, tmp_path / "x"), *PRUNE
    )


def test_what_cannot_be_pruned_is_refused_before_the_training(folders, data, tmp_path):  # noqa: F811
    words = recover(folders, data, tmp_path / "out")
    original = recover((folders[1], folders[1]), data, tmp_path / "out")
    fail("--rank is 4, but experts are decomposed for --final-keep-rows only", *words, "--rank", "4")
    fail("final_keep is 1.5, it must be", *words, "--final-keep-rows", "1.5")
    fail("rank is 25, it must be .* 1 to 24", *words, "--final-keep-rows", "0.1", "--rank", "25")
    fail("rank is 0, it must be", *words, "--final-keep-rows", "0.1", "--rank", "0")
    fail("initial_warmup is 2.5, it must be a whole", *words, "--final-keep-rows", "0.1", "--initial-warmup", "2.5")
    fail("has no dense merged experts to decompose", *original, "--final-keep-rows", "0.1", "--rank", "4")
    assert not working_folder(tmp_path / "out").exists()


def test_new_factors_have_the_dtype_of_the_experts_they_replace(folders):  # noqa: F811
    model = load_model(folders[0]).float()
    dtypes = dict.fromkeys(dict(model.named_parameters()), torch.float32)
    experts = "model.layers.1.mlp.experts"
    dtypes |= {name: torch.bfloat16 for name in dtypes if name.startswith(experts)}
    now = RowPruning(0.1, rank=2).prepare(model, dtypes)
    assert set(now) == set(dict(model.named_parameters()))
    assert {name for name, dtype in now.items() if dtype == torch.bfloat16} == {
        f"{experts}.{matrix}_{part}" for matrix in ("gate", "up", "down") for part in ("left", "right", "sparse")
    }


def test_a_configuration_is_enough_to_check(pruned):
    RowPruning(0.2).check(empty_model(read_config(pruned[0])))
