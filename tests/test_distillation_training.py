import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distillation import FAMILIES, arguments, examples, models, trainer_of, weights_of
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.training import DistillationTrainer, cache_teacher
from hf_mcsmoe.training.recovery_data import RowCollator
from hf_mcsmoe.training.routers import find_routers

TESTS = Path(__file__).parent
STEPS = {"num_train_epochs": 2, "gradient_accumulation_steps": 1}


def is_equal(model, weights):
    return all(torch.equal(value, model.get_parameter(name)) for name, value in weights.items())


@pytest.mark.parametrize("task", ["causal", pytest.param("seq2seq", marks=pytest.mark.slow)])
def test_interrupted_anywhere_and_resumed_gives_equal_bits(task, tmp_path):
    changes = {"attention_dropout": 0.2} if task == "causal" else {"dropout_rate": 0.2}
    original, teacher = models(task, **changes)
    options = {**STEPS, "save_strategy": "steps", "save_steps": 1}
    whole = copy.deepcopy(original)
    trainer_of(whole, teacher, task, tmp_path / "whole", **options).train()
    weights = weights_of(whole)
    assert not is_equal(original, weights)
    for step in range(1, 6):
        student = copy.deepcopy(original)
        trainer = trainer_of(student, teacher, task, tmp_path / "resumed", **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert is_equal(student, weights), step
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["step"] for entry in logged] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("task", ["causal", pytest.param("seq2seq", marks=pytest.mark.slow)])
def test_experts_of_different_widths_are_recovered_and_resumed(task, original, compress, tmp_path):
    recipe = {"similarity": None, "grouping": "drop", "alignment": None, "merging": None, "selection": "gated_obs"}
    narrowed, teacher = compress(FAMILIES[task], keep=0.4, keep_experts=0.75, **recipe), original(FAMILIES[task])
    widths = {int(width) for one in form_layers(narrowed).values() for width in one.offsets.diff()}
    assert len(widths) > 1 and {one.form for one in form_layers(narrowed).values()} == {"ragged"}
    options = {**STEPS, "save_strategy": "steps", "save_steps": 2, "hidden_state_weight": 1.0, "router_weight": 1.0}
    whole = copy.deepcopy(narrowed)
    trainer_of(whole, teacher, task, tmp_path / "whole", **options).train()
    for name, parameter in whole.named_parameters():
        is_trained = ".experts." in name and parameter.numel() > 0
        assert not is_trained or not torch.equal(parameter, narrowed.get_parameter(name)), name
    narrowed.save_pretrained(tmp_path / "start")
    auto_class = AutoModelForCausalLM if task == "causal" else AutoModelForSeq2SeqLM
    student = auto_class.from_pretrained(tmp_path / "start")
    trainer = trainer_of(student, teacher, task, tmp_path / "resumed", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert is_equal(student, weights_of(whole))
    trainer.save_model(str(tmp_path / "end"))
    assert is_equal(auto_class.from_pretrained(tmp_path / "end"), weights_of(whole))


def test_a_saved_student_loads_in_a_new_process_state_and_goes_on(tmp_path):
    original, teacher = models("causal")
    options = {**STEPS, "save_strategy": "steps", "save_steps": 3}
    whole = copy.deepcopy(original)
    trainer_of(whole, teacher, "causal", tmp_path, **options).train()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", dtype="auto")
    trainer_of(student, teacher, "causal", tmp_path, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert is_equal(student, weights_of(whole))


def test_the_best_student_is_loaded_at_the_end(tmp_path):
    student, teacher = models("causal")
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_kl", "greater_is_better": True}
    trainer = trainer_of(student, teacher, "causal", tmp_path, learning_rate=0.05, **STEPS, **options, **best)
    trainer.train()
    scores = {e["step"]: e["eval_kl"] for e in trainer.state.log_history if "eval_kl" in e}
    step = max(scores, key=scores.get)  # the worst one, so that it is not simply the last
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{step}") and len(set(scores.values())) > 1
    kept = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert is_equal(student, weights_of(kept))
    assert trainer.evaluate()["eval_kl"] == pytest.approx(scores[step])


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
@pytest.mark.parametrize(
    "features", [pytest.param({}, marks=pytest.mark.slow), {"hidden_state_weight": 1.0, "router_weight": 1.0}]
)
def test_activation_checkpointing_changes_nothing(task, features, tmp_path):
    original, teacher = models(task)
    trained, calls = [], [0, 0]

    def count(*_):
        calls[checkpointing] += 1

    for checkpointing in (False, True):
        student = copy.deepcopy(original)
        find_routers(student)[0].scores.register_forward_hook(count)
        options = {"activation_checkpointing": checkpointing, **features}
        trainer = trainer_of(student, teacher, task, tmp_path, **options)
        trainer.train()
        trained.append(weights_of(student))
    assert calls[1] == 2 * calls[0]
    for name, value in trained[1].items():
        torch.testing.assert_close(value, trained[0][name], rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_stays_close(tmp_path):
    original, teacher = models("causal")
    losses = []
    for bf16 in (False, True):
        trainer = trainer_of(copy.deepcopy(original), teacher, "causal", tmp_path, bf16=bf16)
        trainer.train()
        losses.append([entry["loss_task"] for entry in trainer.state.log_history if "loss" in entry])
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_a_student_in_bfloat16_and_a_teacher_in_float32(tmp_path):
    student, teacher = models("causal")
    trainer_of(student.to(torch.bfloat16), teacher, "causal", tmp_path).train()
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in student.parameters())


def test_chunks_change_no_result(tmp_path):
    original, teacher = models("causal")
    trained = []
    for chunk in (None, 5):
        student = copy.deepcopy(original)
        trainer_of(student, teacher, "causal", tmp_path, chunk_tokens=chunk).train()
        trained.append(weights_of(student))
    for name, value in trained[1].items():
        torch.testing.assert_close(value, trained[0][name], rtol=1e-5, atol=1e-6)


def test_distillation_brings_the_student_to_the_teacher(tmp_path):
    student, teacher = models("causal")
    options = {"task_weight": 0.0, "num_train_epochs": 30, "learning_rate": 3e-3, "logging_steps": 50}
    trainer = trainer_of(student, teacher, "causal", tmp_path, **options)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.3 * before


def test_a_lora_student_keeps_its_weights_and_its_routers(tmp_path):
    student, teacher = models("causal")
    before = weights_of(student)
    adapted = get_peft_model(student, LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    assert len(find_routers(adapted)) == 3
    trainer = trainer_of(adapted, teacher, "causal", tmp_path, router_weight=0.1, save_strategy="epoch")
    trainer.train()
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()
    moved = [name for name, p in adapted.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert len(moved) == 6
    assert is_equal(adapted.unload(), before)


TWO_PROCESSES = """
import json, sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from distillation import models, trainer_of, weights_of
torch.set_num_threads(1)
student, teacher = models("causal")
source = teacher if sys.argv[3] == "live" else sys.argv[3]
options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.5}
trainer = trainer_of(student, source, "causal", sys.argv[2], per_device_train_batch_size=2,
                     gradient_accumulation_steps=2, train_sampling_strategy="sequential",
                     per_device_eval_batch_size=5, **options)
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    torch.save(weights_of(student), sys.argv[2] + "/weights.pt")
    print("RESULT " + json.dumps({"world": dist.get_world_size(), "logs": logs, "eval": metrics}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["live", "cached"])
def test_two_processes_equal_one(kind, tmp_path):
    student, teacher = models("causal")
    source, rows = teacher, examples("causal")
    if kind == "cached":
        file = tmp_path / "teacher.safetensors"
        source = cache_teacher(teacher, rows, file, top_k=20, data_collator=RowCollator(0, "causal"), progress=False)
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    words = ["--standalone", "--nproc-per-node", "2", str(tmp_path / "run.py"), str(TESTS), str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", *words, "live" if kind == "live" else str(source)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert output.returncode == 0, output.stderr
    result = json.loads(next(line for line in output.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert result["world"] == 2
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.5}
    sequential = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8}
    trainer = trainer_of(student, source, "causal", tmp_path / "one", **sequential, **options)
    trainer.train()
    one = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(one) == len(result["logs"]) == 2
    for ours, theirs in zip(result["logs"], one, strict=True):
        for name in ("loss", "loss_task", "loss_kl", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name, value in torch.load(tmp_path / "weights.pt", weights_only=True).items():
        torch.testing.assert_close(value, student.get_parameter(name), rtol=1e-4, atol=1e-5)
    for name, value in trainer.evaluate().items():  # 12 rows in batches of 5: one process repeats rows
        if "loss" in name or "kl" in name:
            assert result["eval"][name] == pytest.approx(value, rel=1e-4), name


def test_the_tokenizer_of_the_collator_is_found():
    class Collator(RowCollator):
        tokenizer = "that of the collator"

    student, teacher = models("causal")
    args = arguments("unused")
    trainer = DistillationTrainer(student, args, teacher=teacher, data_collator=Collator(0, "causal"))
    assert trainer.data_collator.tokenizer == "that of the collator"
