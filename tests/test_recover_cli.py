import json
import re
import shutil

import numpy as np
import pytest
import torch
from distillation import models, reference_means
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer
from typer.testing import CliRunner

from hf_mcsmoe.checkpoint import save_checkpoint
from hf_mcsmoe.cli import app
from hf_mcsmoe.cli.training_options import training_values
from hf_mcsmoe.training.recovery import working_folder
from hf_mcsmoe.training.recovery_data import load_recovery_data

QUICK = ("--use-cpu", "--per-device-train-batch-size", "4", "--save-steps", "2", "--learning-rate", "1e-2")


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})


def succeed(*words):
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(message, *words):
    """The command ends with exit code 2 and one line on stderr that matches `message`."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert re.search(message, line), line


def tokenizer():
    made = Tokenizer(WordLevel({f"w{number}": number for number in range(160)}, unk_token="w0"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w2", pad_token="w0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder of a compressed bfloat16 model with report and tokenizer, folder of its original)."""
    root = tmp_path_factory.mktemp("models")
    student, teacher = models("causal")
    report = student.compression_report
    student.model.norm.weight.data *= 2  # damage that a few steps repair
    save_checkpoint(student.to(torch.bfloat16), report, root / "student", tokenizer=tokenizer())
    teacher.to(torch.bfloat16).save_pretrained(root / "teacher")
    return root / "student", root / "teacher"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """32 rows of 20 tokens in a file."""
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.save(path, torch.randint(3, 160, (32, 20), generator=torch.Generator().manual_seed(0)).numpy())
    return path


def recover(folders, data, output, *words):
    student, teacher = folders
    return "recover", student, "--teacher", teacher, "--data", data, "--output", output, *QUICK, *words


def test_recover_writes_a_better_checkpoint_with_its_reports(folders, data, tmp_path):
    words = ("--num-train-epochs", "4", "--task-weight", "0", "--teacher-dtype", "float32")
    text = succeed(*recover(folders, data, tmp_path / "out", *words))
    assert "import hf_mcsmoe" in text and "32 steps" in text  # 30 rows in batches of 4, 4 epochs
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "README.md"}
    assert names >= {"compression_report.json", "recovery_report.json"} and "training_args.bin" not in names
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    report = json.loads((tmp_path / "out" / "recovery_report.json").read_text())
    before, after = report["held_out_before"], report["held_out_after"]
    assert after["kl"] < before["kl"]
    assert (report["model"], report["teacher"], report["steps"]) == ("student", "teacher", 32)
    assert (report["data"]["rows"], report["data"]["held_out_rows"], report["data"]["tokens"]) == (30, 2, 600)
    assert report["arguments"]["learning_rate"] == 0.01 and report["arguments"]["num_train_epochs"] == 4
    assert str(tmp_path) not in (tmp_path / "out" / "recovery_report.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.use_cache
    original = AutoModelForCausalLM.from_pretrained(folders[1], dtype="float32")
    held_out = load_recovery_data(data, None, "causal").held_out
    loss, kl, _ = reference_means(model.float(), original, "causal", held_out, temperature=2.0)
    assert after["loss_task"] == pytest.approx(loss, rel=2e-6)  # of the weights as they are on disk
    assert after["kl"] == pytest.approx(kl, rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {before['loss_task']:.4f} | {after['loss_task']:.4f} |" in card
    assert "Teacher: `teacher`. Routers frozen." in card
    assert "## Recovery" not in (folders[0] / "README.md").read_text()


@pytest.mark.slow
def test_an_interrupted_recovery_is_resumed_to_equal_bits(folders, data, tmp_path, monkeypatch):
    succeed(*recover(folders, data, tmp_path / "whole"))
    step = Trainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise OSError("the power went off")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop)
    again = recover(folders, data, tmp_path / "again")
    fail("the power went off", *again)
    monkeypatch.undo()
    assert not (tmp_path / "again").exists() and (working_folder(tmp_path / "again") / "checkpoint-4").is_dir()
    fail("holds an interrupted recovery. Continue it with --resume", *again)
    fail("had another values", *again, "--resume", "--temperature", "3")
    fail("had another data", *again, "--resume", "--num-samples", "20")
    steps = []
    monkeypatch.setattr(Trainer, "training_step", lambda self, *args: steps.append(0) or step(self, *args))
    succeed(*again, "--resume")
    assert len(steps) == 8 - 4
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    reports = [json.loads((tmp_path / name / "recovery_report.json").read_text()) for name in ("whole", "again")]
    assert reports[0]["held_out_before"] == reports[1]["held_out_before"]
    assert not working_folder(tmp_path / "again").exists()


@pytest.mark.slow
def test_a_cached_teacher_recovers_like_the_live_one(folders, data, tmp_path):
    student, teacher = folders
    cache = tmp_path / "teacher.safetensors"
    words = ("--data", data, "--top-k", "160", "--temperature", "1.5", "--dtype", "float32")
    assert "Written to" in succeed("cache-teacher", teacher, "--output", cache, *words)
    assert cache.stat().st_size > 32 * 19 * (160 * 4 + 161 * 4)
    losses = []
    for name, source in (("live", teacher), ("cached", cache)):
        options = ("--temperature", "1.5", "--teacher-dtype", "float32", *QUICK)
        succeed("recover", student, "--teacher", source, "--data", data, "--output", tmp_path / name, *options)
        losses.append(json.loads((tmp_path / name / "recovery_report.json").read_text())["held_out_after"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    fail("is not among", "recover", student, "--teacher", cache, "--output", tmp_path / "x", "--temperature", "1.5",
         "--data", data, "--sequence-length", "10", *QUICK)  # fmt: skip


def test_text_is_packed_and_every_domain_held_out(tmp_path):
    rows = [{"text": " ".join(f"w{30 + (n + i) % 70}" for i in range(400)), "domain": "ab"[n % 2]} for n in range(4)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = load_recovery_data(path, tokenizer(), "causal", sequence_length=32, vocab_size=160)
    lengths = [len(row["input_ids"]) for row in (*data.train, *data.held_out)]
    # Two texts of 400 tokens and a separator a domain; the last token would be a row of its own.
    assert set(lengths) == {32} and sum(lengths) == 2 * 800
    assert len(data.held_out) == 4 and len(data.sources) == 2
    fewer = load_recovery_data(path, tokenizer(), "causal", sequence_length=32, num_samples=4)
    assert len(fewer.train) + len(fewer.held_out) == 8


@pytest.mark.slow
def test_an_encoder_decoder_learns_from_inputs_and_targets(tmp_path):
    student, teacher = models("seq2seq")
    save_checkpoint(student, student.compression_report, tmp_path / "student", tokenizer=tokenizer())
    teacher.save_pretrained(tmp_path / "teacher")
    rows = [{"input": f"w{n + 3} w{n + 5} w9", "target": f"w{n + 4} w2"} for n in range(20)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    succeed(
        "recover", tmp_path / "student", "--teacher", tmp_path / "teacher", "--data", path, "--output", out, *QUICK
    )
    report = json.loads((out / "recovery_report.json").read_text())
    assert report["data"]["rows"] == 19 and report["held_out_after"]["loss_task"] > 0
    path.write_text("\n".join(json.dumps({"input": row["input"]}) for row in rows))
    words = ("--teacher", tmp_path / "teacher", "--data", path, "--output", tmp_path / "no")
    fail("has no 'target'", "recover", tmp_path / "student", *words)


def test_a_file_and_options_make_the_arguments(tmp_path):
    path = tmp_path / "training.yaml"
    path.write_text("learning_rate: 3e-5\nnum_train_epochs: 2\nbf16: true\nlr_scheduler_kwargs: {num_cycles: 2}\n")
    assert training_values(str(path), ["--num-train-epochs", "3", "--freeze_routers=false", "--use-cpu"]) == {
        "learning_rate": 3e-5,
        "num_train_epochs": 3,
        "bf16": True,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "freeze_routers": False,
        "use_cpu": True,
    }


def test_unknown_and_wrong_arguments_are_refused_before_anything_is_loaded(tmp_path):
    words = ("recover", tmp_path / "nowhere", "--output", tmp_path / "out")
    path = tmp_path / "training.yaml"
    for text, message in (
        ("learning_rat: 1.0", "training.yaml has no key 'learning_rat'.*Did you mean 'learning_rate'"),
        ("- 1", "holds no names and values"),
        ("a: [", "is not valid YAML"),
        ("output_dir: x", "output_dir in training.yaml is set by --output"),
        ("learning_rate: fast", "learning_rate.*fast"),
    ):
        path.write_text(text)
        fail(message, *words, "--config", path)
    fail("There is no file 'none.yaml'", *words, "--config", "none.yaml")
    fail("the command line has no key 'temperatur'.*Did you mean 'temperature'", *words, "--temperatur", "3")
    fail("There is no teacher. Give --teacher", *words)
    fail("temperature is -1.0", *words, "--teacher", "x", "--temperature", "-1")
    fail("no folder or file", *words, "--teacher", "x")
    fail("'DIR' belongs to no option", *words, "DIR")
    assert not (tmp_path / "out").exists()


def test_outputs_are_not_overwritten_unasked(folders, data, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(folders[0], output)
    fail("is not empty", *recover(folders, data, output))
    succeed(*recover(folders, data, output, "--overwrite", "--max-steps", "1"))
    assert (output / "recovery_report.json").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_model_that_was_not_compressed_here_recovers_without_a_card(data, folders, tmp_path):
    tiny_model("qwen3_moe", seed=3).save_pretrained(tmp_path / "plain")
    words = ("--teacher", folders[1], "--data", data, "--output", tmp_path / "out", "--max-steps", "1", *QUICK)
    text = succeed("recover", tmp_path / "plain", *words)
    assert "import hf_mcsmoe" not in text
    assert not (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "recovery_report.json").is_file()


def test_router_distillation_changes_routers_alone(folders, data, tmp_path):
    words = ["--only-routers", "--task-weight", "0", "--temperature", "1", "--max-steps", "3"]
    succeed(*recover(folders, data, tmp_path / "out", *words))
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (folders[0], tmp_path / "out"))
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {n for n, _ in after.named_parameters() if n.endswith(".gate.weight")}
    assert "Routers trained, nothing else." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
