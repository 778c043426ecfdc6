import copy

import pytest
import torch
from distillation import (
    arguments,
    classifiers,
    examples,
    left_padded,
    models,
    reference_means,
    trainer_of,
    weights_of,
)
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

from hf_mcsmoe.training import DistillationArguments, DistillationTrainer
from hf_mcsmoe.training.routers import find_routers
from hf_mcsmoe.training.token_losses import IGNORED

NO_DROPOUT = {"causal": {}, "seq2seq": {"dropout_rate": 0.0, "router_jitter_noise": 0.0}, "classification": {}}


@pytest.fixture(params=["causal", "seq2seq", "classification"])
def task(request):
    return request.param


def pair(task):
    return classifiers() if task == "classification" else models(task, **NO_DROPOUT[task])


def batch_of(trainer, rows):
    return trainer._prepare_inputs(trainer.data_collator(rows))


def test_the_loss_is_that_of_the_definition_for_ragged_rows(task, tmp_path):
    student, teacher = pair(task)
    rows = examples(task)
    trainer = trainer_of(student, teacher, task, tmp_path, temperature=3.0, task_weight=0.7, distillation_weight=0.4)
    task_loss, kl, number = reference_means(student, teacher, task, rows, temperature=3.0)
    batch = batch_of(trainer, rows)
    loss = trainer.compute_loss(student.train(), batch)
    assert loss.item() == pytest.approx(0.7 * task_loss + 0.4 * 9 * kl, rel=2e-5)
    counted = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    assert counted == number
    assert trainer.compute_loss(student, batch, num_items_in_batch=2 * counted).item() == pytest.approx(
        loss.item() / 2
    )


def test_an_evaluation_weighs_tokens_not_batches(task, tmp_path):
    student, teacher = pair(task)
    metrics = trainer_of(student, teacher, task, tmp_path, per_device_eval_batch_size=5).evaluate()
    task_loss, kl, _ = reference_means(student, teacher, task, examples(task), temperature=2.0)
    assert metrics["eval_loss_task"] == pytest.approx(task_loss, rel=1e-5)
    assert metrics["eval_kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(task_loss + 4 * kl, rel=1e-5)
    assert student.training is False


def test_padding_is_no_target_whatever_the_labels_say(tmp_path):
    student, teacher = models("causal")
    trainer = trainer_of(student, teacher, "causal", tmp_path)
    rows = examples("causal")
    trainer.data_collator.collator = left_padded
    batch = batch_of(trainer, rows)
    assert (batch["labels"] != IGNORED).sum() == sum(len(row["input_ids"]) - 1 for row in rows)
    task_loss, kl, _ = reference_means(student, teacher, "causal", rows, temperature=2.0)
    assert trainer.compute_loss(student, batch).item() == pytest.approx(task_loss + 4 * kl, rel=1e-4)


def test_labels_that_are_masked_are_no_targets(tmp_path):
    student, teacher = models("causal")
    trainer = trainer_of(student, teacher, "causal", tmp_path)
    batch = batch_of(trainer, examples("causal", number=3))
    full, lengths = trainer.compute_loss(student, batch), batch["attention_mask"].sum(-1)
    answers = {**batch, "labels": batch["labels"].clone()}
    answers["labels"][:, :4] = IGNORED
    prompt = {**batch, "labels": batch["labels"].clone()}
    prompt["labels"][:, 4:] = IGNORED
    parts = [
        trainer.compute_loss(student, part, num_items_in_batch=int(lengths.sum()) - 3) for part in (answers, prompt)
    ]
    assert sum(parts).item() == pytest.approx(full.item(), rel=1e-5)


@pytest.mark.parametrize(
    "features", [pytest.param({}, marks=pytest.mark.slow), {"hidden_state_weight": 0.5, "router_weight": 0.5}]
)
def test_accumulated_ragged_batches_equal_one_large_batch(task, features, tmp_path):
    if task == "classification":
        features = {name: value for name, value in features.items() if name == "hidden_state_weight"}
    trained = []
    student, teacher = pair(task)
    for size, steps in ((12, 1), (3, 4), (1, 12)):
        copied = copy.deepcopy(student)
        options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.5}
        trainer = trainer_of(
            copied,
            teacher,
            task,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **options,
            **features,
        )
        trainer.train()
        assert trainer.state.global_step == 1
        trained.append((weights_of(copied), trainer.state.log_history[0]))
    for weights, log in trained[1:]:
        for name, value in weights.items():
            torch.testing.assert_close(value, trained[0][0][name], rtol=1e-4, atol=2e-6)
        for part in [name for name in log if name.startswith("loss")]:
            assert log[part] == pytest.approx(trained[0][1][part], rel=1e-4), part
    assert any(not torch.equal(value, student.state_dict()[name]) for name, value in trained[0][0].items())


def test_without_a_teacher_it_trains_as_trainer_does(tmp_path):
    student, _ = models("causal")
    copied = copy.deepcopy(student)
    trainer_of(student, None, "causal", tmp_path, freeze_routers=False, gradient_accumulation_steps=2).train()
    from hf_mcsmoe.training.recovery_data import RowCollator

    args = arguments(tmp_path, gradient_accumulation_steps=2).to_dict()
    names = TrainingArguments.__dataclass_fields__
    plain = TrainingArguments(**{name: value for name, value in args.items() if name in names})
    Trainer(copied, plain, train_dataset=examples("causal"), data_collator=RowCollator(0, "causal")).train()
    for name, value in weights_of(copied).items():
        torch.testing.assert_close(student.get_parameter(name), value, rtol=1e-4, atol=1e-5)


def test_the_parts_are_logged_and_add_up(tmp_path):
    student, teacher = models("causal")
    weights = {"task_weight": 0.5, "distillation_weight": 2.0, "hidden_state_weight": 0.3, "router_weight": 0.2}
    trainer = trainer_of(student, teacher, "causal", tmp_path, logging_steps=2, num_train_epochs=2, **weights)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    parts = ("loss_task", "loss_kl", "loss_hidden", "loss_router")
    for entry in logs:
        total = sum(weight * entry[name] for weight, name in zip(weights.values(), parts, strict=True))
        assert total == pytest.approx(entry["loss"], rel=1e-5)
        assert all(entry[name] > 0 for name in parts)
    metrics = trainer.evaluate()
    total = sum(
        weights[f"{name}_weight"] * metrics[f"eval_loss_{short}"]
        for name, short in (("task", "task"), ("hidden_state", "hidden"), ("router", "router"))
    )
    assert total + 2.0 * 4 * metrics["eval_kl"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_feature_terms_follow_their_definition(task, tmp_path):
    student, teacher = models(task, **NO_DROPOUT[task])
    rows = examples(task, number=3)
    trainer = trainer_of(student, teacher, task, tmp_path, task_weight=0, distillation_weight=0, hidden_state_weight=1)
    batch = batch_of(trainer, rows)
    expected, number = 0.0, 0
    for row in rows:
        ids = {"input_ids": torch.tensor([row["input_ids"]])}
        if task == "seq2seq":
            ids["decoder_input_ids"] = torch.tensor([[0, *row["labels"][:-1]]])
        with torch.no_grad():
            ours, theirs = (model(**ids, output_hidden_states=True) for model in (student, teacher))
        targets = len(row["labels"]) if task == "seq2seq" else len(row["input_ids"]) - 1
        streams = ("decoder_hidden_states", "encoder_hidden_states") if task == "seq2seq" else ("hidden_states",)
        layers = []
        for name in streams:
            for h, h_teacher in zip(ours[name][1:], theirs[name][1:], strict=True):
                error = ((h - h_teacher) ** 2).sum(-1) / (h_teacher**2).sum(-1)
                layers.append(error[0].mean() * targets if name[0] == "e" else error[0, :targets].sum())
        expected, number = expected + float(sum(layers) / len(layers)), number + targets
    assert trainer.compute_loss(student, batch).item() == pytest.approx(expected / number, rel=1e-3)


def test_routers_are_frozen_unless_asked_for(task, tmp_path):
    for freeze in (True, False):
        student, teacher = pair(task)
        trainer_of(student, teacher, task, tmp_path, freeze_routers=freeze)
        routers = find_routers(student)
        assert len(routers) == (4 if task == "seq2seq" else 3)
        of_routers = {id(p) for router in routers for p in router.module.parameters()}
        for parameter in student.parameters():
            assert parameter.requires_grad is not (freeze and id(parameter) in of_routers)


def test_routers_are_found_where_no_family_knows_the_experts():
    student, _ = models("causal")
    expected = [(router.layer, router.module, router.num_slots) for router in find_routers(student)]
    for name, _, _ in expected:
        student.get_submodule(name).down_proj.data = torch.zeros(3)  # as no family stores experts
        student.get_submodule(name).__class__ = torch.nn.Module
        del student.get_submodule(name).down_proj
    assert [(router.layer, router.module, router.num_slots) for router in find_routers(student)] == expected


def test_the_teacher_stays_as_it_is(tmp_path):
    student, teacher = models("causal")
    before = weights_of(teacher.train())
    trainer = trainer_of(student, teacher, "causal", tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    assert teacher.training is False and all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in weights_of(teacher).items())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert type(reloaded).__name__ == "MergedQwen3MoeForCausalLM"
    assert reloaded.num_parameters() == student.num_parameters() < teacher.num_parameters()
    for name, value in weights_of(reloaded).items():
        assert torch.equal(value, student.get_parameter(name))


def test_a_teacher_with_a_device_map_or_in_a_folder(tmp_path):
    student, teacher = models("causal")
    batch = batch_of(trainer_of(student, teacher, "causal", tmp_path), examples("causal"))
    expected = trainer_of(student, teacher, "causal", tmp_path).compute_loss(student, batch)
    teacher.save_pretrained(tmp_path / "teacher")
    by_path = trainer_of(student, tmp_path / "teacher", "causal", tmp_path)
    by_argument = trainer_of(student, None, "causal", tmp_path, teacher=str(tmp_path / "teacher"))
    parts = ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb"]
    mapped = {"lm_head": "cpu", **{f"model.{part}": "disk" if part == "layers.1" else "cpu" for part in parts}}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map=mapped, offload_folder=tmp_path / "offload"
    )
    by_map = trainer_of(student, offloaded, "causal", tmp_path)
    for trainer in (by_path, by_argument, by_map):
        torch.testing.assert_close(trainer.compute_loss(student, batch), expected)


def test_arguments_are_parsed_from_the_command_line():
    words = ["--output_dir", "x", "--temperature", "3", "--distillation_weight", "0.5", "--no_freeze_routers"]
    (args,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses([*words, "--chunk_tokens", "7"])
    assert (args.temperature, args.distillation_weight, args.freeze_routers, args.chunk_tokens) == (3.0, 0.5, False, 7)
    assert args.teacher is None and args.hidden_state_weight == args.router_weight == 0


def test_arguments_out_of_range_are_refused():
    wrong = {
        "temperature": 0.0,
        "task_weight": -1.0,
        "distillation_weight": float("nan"),
        "chunk_tokens": 0,
        "label_smoothing_factor": 0.1,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"^{name} is "):
            arguments("x", **{name: value})
    with pytest.raises(ValueError, match="are all 0"):
        arguments("x", task_weight=0.0, distillation_weight=0.0)


def test_what_cannot_be_distilled_is_refused(tmp_path):
    student, teacher = models("causal")
    refused = [
        (student, {}, "student itself"),
        (tiny_model("qwen3_moe", vocab_size=161), {}, "161 tokens in its vocabulary, the student 160"),
        (tiny_model("switch_transformers"), {}, "only one of them has an encoder"),
        (None, {"router_weight": 1.0}, "router_weight=1.0 needs a live teacher"),
        (None, {"task_weight": 0.0}, "no teacher"),
        (tmp_path / "nothing.safetensors", {}, "no file of cached logits"),
    ]
    for source, changes, message in refused:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            trainer_of(student, source, "causal", tmp_path, **changes)
    with pytest.raises(TypeError, match="teacher cannot be int"):
        trainer_of(student, 3, "causal", tmp_path)
    with pytest.raises(TypeError, match="must be DistillationArguments"):
        DistillationTrainer(student, TrainingArguments(output_dir=str(tmp_path), use_cpu=True), teacher=teacher)
    trainer = trainer_of(student, teacher, "causal", tmp_path)
    with pytest.raises(ValueError, match="has no 'labels'"):
        trainer.compute_loss(student, {"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    teacher.config.problem_type = "regression"
    regression, _ = classifiers()
    regression.config.problem_type = "regression"
    with pytest.raises(ValueError, match="regression"):
        trainer_of(regression, None, "classification", tmp_path)


def test_router_weight_needs_all_rows(compress, tmp_path):
    student = compress("qwen3_moe", layout="native")
    with pytest.raises(ValueError, match="has 4 in the student and 8 in the teacher"):
        trainer_of(student, tiny_model("qwen3_moe"), "causal", tmp_path, router_weight=0.1)
    trainer_of(student, tiny_model("qwen3_moe"), "causal", tmp_path).train()


def test_only_routers_are_trained_where_that_is_asked_for(task, tmp_path):
    student, teacher = pair(task)
    before = weights_of(student)
    router_kd = {"only_routers": True, "task_weight": 0.0, "temperature": 1.0, "weight_decay": 0.1}
    trainer = trainer_of(student, teacher, task, tmp_path, **router_kd)
    assert trainer.args.freeze_routers is False
    trainer.train()
    of_routers = {id(p) for router in find_routers(student) for p in router.module.parameters()}
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) is not (id(parameter) in of_routers)
