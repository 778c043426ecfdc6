import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decomposed_models import decompose_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_mcsmoe.modeling.densify import harden
from hf_mcsmoe.training import RowPruner, SparsityScheduleCallback, sparse_parts
from hf_mcsmoe.training.schedule import SparsitySchedule

MODEL_TYPES = ["qwen3_moe", "switch_transformers"]
STEPS = 8
SCHEDULE = {"final_keep": 0.3, "initial_warmup": 2, "final_warmup": 2, "beta": 0.5}


class Spy(TrainerCallback):
    """Remembers which rows were left after each step; stops after one of them if asked to."""

    def __init__(self, stop_after=None):
        self.rows_after_step, self.stop_after = {}, stop_after

    def on_step_end(self, args, state, control, model=None, **kwargs):  # noqa: ARG002
        parts = sparse_parts(model).values()
        self.rows_after_step[state.global_step] = torch.cat([(part.parameter != 0).any(1) for part in parts])
        control.should_training_stop = state.global_step == self.stop_after


@pytest.fixture
def model(request, original):
    return decompose_model(original(getattr(request, "param", "qwen3_moe")), rank=4, keep_rows=1.0)


@pytest.fixture
def dataset(tokens):
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.fixture
def make_trainer(dataset, tmp_path):
    """`make_trainer(model, callbacks, **arguments)`: 8 steps of 3 rows, AdamW with a high rate, shuffled."""

    def make(model, callbacks, folder="out", **arguments):
        defaults = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
        }
        args = TrainingArguments(str(tmp_path / folder), **{**defaults, **arguments})
        return Trainer(model, args, train_dataset=dataset, callbacks=callbacks)

    return make


def assert_equal_weights(first, second):
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.parametrize("model", MODEL_TYPES, indirect=True)
def test_rows_follow_the_schedule(model, make_trainer):
    spy = Spy()
    make_trainer(model, [SparsityScheduleCallback(**SCHEDULE, harden=False), spy]).train()
    total = spy.rows_after_step[1].numel()
    # T = 8, T_i = 2, T_f = 2: 0.3 + 0.7 * (1 - (step - 2) / 4)^3
    shares = [1, 1, 0.3 + 0.7 * 0.75**3, 0.3 + 0.7 * 0.5**3, 0.3 + 0.7 * 0.25**3, 0.3, 0.3, 0.3]
    assert [int(rows.sum()) for rows in spy.rows_after_step.values()] == [int(x * total + 0.5) for x in shares]
    final = spy.rows_after_step[6]
    assert torch.equal(final, spy.rows_after_step[7]) and torch.equal(final, spy.rows_after_step[8])
    parts = sparse_parts(model).values()
    assert torch.equal(final, torch.cat([(part.parameter != 0).any(1) for part in parts]))


def test_hardened_when_the_training_ends(model, make_trainer, prompt, tmp_path):
    trainer = make_trainer(model, [SparsityScheduleCallback(**SCHEDULE)])
    trainer.train()
    assert sum(part.row.numel() for part in sparse_parts(model).values()) == int(0.3 * 1920 + 0.5)
    trainer.save_model(str(tmp_path / "pruned"))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(prompt).logits, model.eval()(prompt).logits)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_does_what_a_plain_loop_does(model, make_trainer, dataset, accumulation):
    by_hand = copy.deepcopy(model).train()
    # The order of the rows and the learning rate are kept simple; the rest is Trainer's own.
    how = {"gradient_accumulation_steps": accumulation, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
    trainer = make_trainer(
        model, [SparsityScheduleCallback(**SCHEDULE)], train_sampling_strategy="sequential", max_steps=4, **how
    )
    trainer.train()
    pruner = RowPruner(by_hand, SparsitySchedule(4, 2, 2, 0.3), beta=0.5)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.0)
    rows = torch.stack([one["input_ids"] for one in dataset]).split(3 * accumulation)
    for step in range(1, 5):
        batch = rows[step - 1]
        by_hand(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        pruner.step(step)
        optimizer.zero_grad()
    harden(by_hand)
    mine, reference = model.state_dict(), by_hand.state_dict()
    for name, value in reference.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODEL_TYPES, indirect=True)
@pytest.mark.parametrize("stop_after", [1, 4, 7], ids=["warm-up", "pruning", "final phase"])
def test_resumed_training_is_bit_equal(model, make_trainer, stop_after, tmp_path):
    start = copy.deepcopy(model)
    how = {"gradient_accumulation_steps": 2}
    saves = {"save_strategy": "steps", "save_steps": stop_after, **how}
    whole = Spy()
    make_trainer(model, [SparsityScheduleCallback(**SCHEDULE), whole], **how).train()
    interrupted = copy.deepcopy(start)
    early = [SparsityScheduleCallback(**SCHEDULE, harden=False), Spy(stop_after)]
    make_trainer(interrupted, early, "interrupted", **saves).train()
    moved = shutil.move(tmp_path / "interrupted" / f"checkpoint-{stop_after}", tmp_path / "elsewhere")
    resumed, rest = copy.deepcopy(start), Spy()
    callback = SparsityScheduleCallback(**SCHEDULE)
    make_trainer(resumed, [callback, rest], "resumed", **how).train(resume_from_checkpoint=str(moved))
    assert list(rest.rows_after_step) == list(range(stop_after + 1, STEPS + 1))
    for step, rows in rest.rows_after_step.items():
        assert torch.equal(rows, whole.rows_after_step[step]), step
    assert_equal_weights(model, resumed)


@pytest.mark.slow
def test_resumed_with_restored_callbacks(model, make_trainer, tmp_path):
    start = copy.deepcopy(model)
    how = {"save_strategy": "steps", "save_steps": 5, "restore_callback_states_from_checkpoint": True}
    make_trainer(model, [SparsityScheduleCallback(**SCHEDULE)], **how).train()
    # Trainer makes a callback with the options of the checkpoint; those given here are not used.
    trainer = make_trainer(start, [SparsityScheduleCallback(final_keep=0.9)], "resumed", **how)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert_equal_weights(model, start)


def test_checkpoint_without_the_callback_is_refused(model, make_trainer, tmp_path):
    start = copy.deepcopy(model)
    make_trainer(model, [], save_strategy="steps", save_steps=4).train()
    trainer = make_trainer(start, [SparsityScheduleCallback(**SCHEDULE)])
    with pytest.raises(ValueError, match="checkpoint at step 4 should have the state of one Sparsity"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


def test_training_that_ends_early_says_so(model, make_trainer, caplog):
    make_trainer(model, [SparsityScheduleCallback(**SCHEDULE), Spy(stop_after=4)]).train()
    assert "rows are left at step 4 of 8, final_keep=0.3 means 576" in caplog.text
    assert sum(part.row.numel() for part in sparse_parts(model).values()) == int((0.3 + 0.7 / 8) * 1920 + 0.5)


def test_skipped_optimizer_steps_are_not_measured(model, make_trainer):
    class Skips:
        step_was_skipped = True

    callback = SparsityScheduleCallback(**SCHEDULE)
    trainer = make_trainer(model, [callback])
    state = trainer.state
    state.max_steps = STEPS
    callback.on_train_begin(trainer.args, state, trainer.control, model=model)
    for part in sparse_parts(model).values():
        part.parameter.grad = torch.full_like(part.parameter, float("inf"))
    callback.on_optimizer_step(trainer.args, state, trainer.control, optimizer=Skips())
    assert not callback.pruner.importance.average


def test_half_precision_autocast(model, make_trainer):
    make_trainer(model, [SparsityScheduleCallback(**SCHEDULE)], bf16=True, max_steps=4).train()
    assert sum(part.row.numel() for part in sparse_parts(model).values()) == 576
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_gradient_checkpointing(model, make_trainer):
    plain = copy.deepcopy(model)
    make_trainer(plain, [SparsityScheduleCallback(**SCHEDULE)]).train()
    make_trainer(model, [SparsityScheduleCallback(**SCHEDULE)], gradient_checkpointing=True).train()
    assert_equal_weights(plain, model)


REFUSED = {
    "steps": (
        {"final_warmup": 7},
        "initial_warmup is 2 and final_warmup 7 steps, together they must not exceed the 8",
    ),
    "keep": ({"final_keep": 1.1}, r"final_keep is 1.1, it must be in \[0, 1\]"),
    "beta": ({"beta": 1}, "beta is 1, it must be in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step(case, model, make_trainer):
    options, message = REFUSED[case]
    spy = Spy()
    with pytest.raises(ValueError, match=message):
        make_trainer(model, [SparsityScheduleCallback(**{**SCHEDULE, **options}), spy]).train()
    assert not spy.rows_after_step


DISTRIBUTED = """
import sys
import torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from decomposed_models import decompose_model
from tiny_models import tiny_model
from transformers import Trainer, TrainingArguments
from hf_mcsmoe.training import SparsityScheduleCallback

torch.set_num_threads(1)
model = decompose_model(tiny_model("qwen3_moe"), rank=4, keep_rows=1.0)
rows = torch.randint(3, 150, (24, 20), generator=torch.Generator().manual_seed(0))
args = TrainingArguments(
    sys.argv[2], max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2, report_to="none", use_cpu=True,
    save_strategy="no", disable_tqdm=True,
)
callback = SparsityScheduleCallback(final_keep=0.3, initial_warmup=1, final_warmup=1, beta=0.5)
trainer = Trainer(model, args, train_dataset=[{"input_ids": r, "labels": r} for r in rows], callbacks=[callback])
assert args.world_size == 2
trainer.train()
save_file(model.state_dict(), f"{sys.argv[2]}/rank{args.process_index}.safetensors")
"""


@pytest.mark.slow
def test_processes_keep_the_same_rows(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(script), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert sum(tensor.shape[0] for name, tensor in first.items() if name.endswith("_sparse")) == 576
