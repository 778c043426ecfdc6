import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from distillation import classifiers, examples, models, trainer_of
from safetensors.torch import load_file, save_file

from hf_mcsmoe.training import CachedTeacher, cache_teacher
from hf_mcsmoe.training.recovery_data import RowCollator

VOCAB = {"causal": 160, "seq2seq": 160, "classification": 4}


@pytest.fixture(params=["causal", "seq2seq", "classification"])
def task(request):
    return request.param


@pytest.fixture
def cache(tmp_path):
    """`cache(teacher, task, rows, **options)`: the file of that teacher's logits."""

    def make(teacher, task, rows=None, name="teacher.safetensors", **options):
        rows = examples(task) if rows is None else rows
        collator = RowCollator(0, task)
        return cache_teacher(
            teacher, rows, tmp_path / name, data_collator=collator, **{"progress": False, "batch_size": 5, **options}
        )

    return make


def pair(task):
    return classifiers() if task == "classification" else models(task)


def loss_and_gradient(trainer, rows):
    student = trainer.model.eval()
    student.zero_grad()
    loss = trainer.compute_loss(student, trainer._prepare_inputs(trainer.data_collator(rows)))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def test_all_logits_give_what_the_live_teacher_gives(task, cache, tmp_path):
    student, teacher = pair(task)
    path = cache(teacher, task, top_k=VOCAB[task], temperature=3.0)
    options = {"task_weight": 0.0, "temperature": 3.0}
    live = trainer_of(student, teacher, task, tmp_path, **options)
    cached = trainer_of(student, path, task, tmp_path, **options)
    shuffled = [examples(task)[place] for place in (7, 2, 11, 0, 5)]  # rank != place in the file, another batch
    loss, gradient = loss_and_gradient(live, shuffled)
    assert loss > 1e-3
    cached_loss, cached_gradient = loss_and_gradient(cached, shuffled)
    assert cached_loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(cached_gradient, gradient, rtol=1e-3, atol=1e-6)
    assert cached.evaluate()["eval_kl"] == pytest.approx(live.evaluate()["eval_kl"], rel=1e-4, abs=1e-6)


def test_fewer_logits_give_a_lower_bound(task, cache, tmp_path):
    student, teacher = pair(task)
    losses = []
    for top_k in (1, 2, 3, VOCAB[task]):
        path = cache(teacher, task, top_k=top_k, name=f"{top_k}.safetensors")
        losses.append(trainer_of(student, path, task, tmp_path).evaluate()["eval_kl"])
    assert all(0 <= few < more for few, more in pairwise(losses)) or (
        task == "classification" and losses == sorted(losses)
    )


def test_the_file_holds_the_definition(cache):
    _, teacher = models("causal")
    rows = examples("causal", number=5)
    file = load_file(cache(teacher, "causal", rows, top_k=6, temperature=0.5))
    lengths = [len(row["input_ids"]) - 1 for row in rows]
    assert file["offsets"].tolist() == [0, *np.cumsum(lengths)]
    with torch.no_grad():
        logits = [teacher(torch.tensor([row["input_ids"]])).logits[0, :-1].double() for row in rows]
    p = torch.softmax(torch.cat(logits) / 0.5, -1)
    values, index = p.sort(descending=True)
    assert torch.equal(file["index"].long(), index[:, :6])
    expected = torch.cat([values[:, :6], values[:, 6:].sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(file["log_prob"].double().exp(), expected, rtol=1e-4, atol=1e-6)


def test_equal_examples_are_stored_once(cache):
    _, teacher = models("causal")
    rows = examples("causal", number=4)
    path = cache(teacher, "causal", [*rows, rows[1], *rows[2:]], top_k=2)
    assert CachedTeacher(path).description.num_examples == 4


def test_other_data_is_refused_before_the_training(task, cache, tmp_path):
    student, teacher = pair(task)
    path = cache(teacher, task, top_k=2)
    rows = examples(task)
    other = {"input_ids": [*rows[3]["input_ids"][:-1], 5]}
    changed = {**rows[3], **other} if task != "seq2seq" else {**rows[3], "labels": [*rows[3]["labels"], 9]}
    for wrong in ([*rows[:3], changed, *rows[4:]], examples(task, seed=2)):
        with pytest.raises(ValueError, match=r"An example is not among the 12 in .*Make the file again"):
            trainer_of(student, path, task, tmp_path, rows=wrong)
    if task == "classification":
        rows[3] = {**rows[3], "labels": 2 - rows[3]["labels"] % 2}
        with pytest.raises(ValueError, match=r"An example is not among"):
            trainer_of(student, path, task, tmp_path, rows=rows)


def test_padding_on_either_side_finds_the_same_example(cache):
    from distillation import left_padded

    _, teacher = models("causal")
    rows = examples("causal")
    cached = CachedTeacher(cache(teacher, "causal", rows, top_k=3))
    right = cached.add_to(RowCollator(0, "causal")(rows))
    batch = left_padded(rows)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    first = batch["attention_mask"].argmax(-1)
    batch["labels"][torch.arange(len(rows)), first] = -100
    right_masked = RowCollator(0, "causal")(rows)
    right_masked["labels"][:, 0] = -100
    left, right = cached.add_to(batch), cached.add_to(right_masked)
    for row, example in enumerate(rows):
        number = len(example["input_ids"]) - 1
        ours, theirs = left["teacher_index"][row], right["teacher_index"][row]
        assert torch.equal(ours[first[row] : first[row] + number], theirs[:number])
        assert (theirs[number:] == 0).all() and (ours[: first[row]] == 0).all()


def test_an_interrupted_run_goes_on_where_it_was(cache, tmp_path, monkeypatch):
    _, teacher = models("causal")
    rows = examples("causal", number=12)
    whole = cache(teacher, "causal", rows, top_k=4).read_bytes()
    calls, forward = [], type(teacher).forward

    def stop_at_second(self, *args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(teacher, "forward", stop_at_second.__get__(teacher))
    with pytest.raises(KeyboardInterrupt):
        cache(teacher, "causal", rows, top_k=4, name="again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()
    path = cache(teacher, "causal", rows, top_k=4, name="again.safetensors")
    assert calls == [5, 5, 5, 2]  # the first 5 are not computed again
    assert path.read_bytes() == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.safetensors", "teacher.safetensors"]


def test_what_is_left_of_another_run_is_not_used(cache, tmp_path):
    _, teacher = models("causal")
    whole = cache(teacher, "causal", top_k=4)
    partial = tmp_path / ".next.safetensors.partial"
    partial.write_bytes(whole.read_bytes())
    path = cache(teacher, "causal", examples("causal", seed=5), top_k=4, name="next.safetensors")
    assert CachedTeacher(path).description.data_sha256 != CachedTeacher(whole).description.data_sha256
    expected = cache(teacher, "causal", examples("causal", seed=5), top_k=4, name="fresh.safetensors")
    assert path.read_bytes() == expected.read_bytes()


def test_it_can_be_sent_to_the_processes_of_a_loader(cache, tmp_path):
    student, teacher = models("causal")
    path = cache(teacher, "causal", top_k=4)
    batch = RowCollator(0, "causal")(examples("causal"))
    cached = CachedTeacher(path)
    before, after = cached.add_to(batch), pickle.loads(pickle.dumps(cached)).add_to(batch)
    assert all(torch.equal(before[name], after[name]) for name in before)
    losses = []
    for workers in (0, 1):
        trainer = trainer_of(student, path, "causal", tmp_path, dataloader_num_workers=workers)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_wrong_requests_are_refused(cache, tmp_path):
    _, teacher = models("causal")
    rows = examples("causal")
    for options, message in (
        ({"top_k": 161}, "top_k is 161, it must be above 0 and at most 160"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rows": []}, "0 examples, but no target"),
        ({"rows": [{"input_ids": [5]}]}, "1 examples, but no target"),
    ):
        with pytest.raises(ValueError, match=message):
            cache(teacher, "causal", **options)
    with pytest.raises(TypeError, match="can be read only once"):
        cache(teacher, "causal", iter(rows))
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        cache(teacher, "causal", name="teacher.bin")
    assert list(tmp_path.iterdir()) == []
    cache(teacher, "causal", top_k=2)
    with pytest.raises(FileExistsError, match="exists"):
        cache(teacher, "causal", top_k=3)
    assert CachedTeacher(cache(teacher, "causal", top_k=3, overwrite=True)).description.top_k == 3
    teacher.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="are not finite"):
        cache(teacher, "causal", top_k=4, overwrite=True)


def test_files_that_do_not_fit_are_refused(cache, tmp_path):
    student, teacher = models("causal")
    path = cache(teacher, "causal", top_k=2, temperature=1.0)
    with pytest.raises(ValueError, match=r"temperature=1.0, but the training 2.0. Set temperature=1.0"):
        trainer_of(student, path, "causal", tmp_path)
    with pytest.raises(ValueError, match=r"hidden_state_weight=1.0 needs a live teacher"):
        trainer_of(student, path, "causal", tmp_path, temperature=1.0, hidden_state_weight=1.0)
    with pytest.raises(ValueError, match="has task='causal'"):
        trainer_of(classifiers()[0], path, "classification", tmp_path, temperature=1.0)
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    newer = load_file(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(newer, tmp_path / "newer.safetensors", {**metadata, "format_version": json.dumps(3)})
    for name, message in (
        ("model", "holds no cached logits"),
        ("text", "is no file of cached logits"),
        ("newer", "format_version 3, this hf_mcsmoe reads up to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            CachedTeacher(tmp_path / f"{name}.safetensors")


def test_pictures_need_a_live_teacher(cache):
    _, teacher = models("causal")
    cached = CachedTeacher(cache(teacher, "causal", top_k=2))
    batch = RowCollator(0, "causal")(examples("causal"))
    with pytest.raises(ValueError, match=r"pixel_values.*Distil from a live teacher"):
        cached.add_to({**batch, "pixel_values": torch.zeros(12, 3)})
