"""What the tests of distillation share: students, ragged examples, arguments, and the loss by slow, obvious loops."""

import torch
from tiny_models import tiny_model
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hf_mcsmoe import MergedSparseMoeConfig, compress_moe
from hf_mcsmoe.training import DistillationArguments, DistillationTrainer
from hf_mcsmoe.training.recovery_data import RowCollator

FAMILIES = {"causal": "qwen3_moe", "seq2seq": "switch_transformers"}


def models(task, keep=0.25, **changes) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student with a quarter of the experts, and its teacher, which predict differently."""
    teacher, student = (tiny_model(FAMILIES[task], **changes) for _ in range(2))
    if task == "seq2seq":
        for model in (teacher, student):
            model.shared.weight.data *= 20  # tied to the head, which scales by d_model^-0.5
    tokens = torch.randint(3, 150, (24, 20), generator=torch.Generator().manual_seed(0))
    recipe = MergedSparseMoeConfig.from_preset("m-smoe", keep=keep)
    return compress_moe(student, recipe, calibration=tokens, progress=False), teacher


def classifiers() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student and a teacher that tell 4 classes apart; the student is not compressed, but trained otherwise."""
    from tiny_models import tiny_config
    from transformers import AutoModelForSequenceClassification

    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(AutoModelForSequenceClassification.from_config(tiny_config("qwen3_moe", num_labels=4)))
    return tuple(made)


def examples(task, number=12, seed=1) -> list[dict]:
    """Rows of 5 to 14 tokens, labels of 2 to 7 or one class."""
    generator = torch.Generator().manual_seed(seed)

    def row(low, high):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(3, 150, (length,), generator=generator).tolist()

    rows = [{"input_ids": row(5, 14)} for _ in range(number)]
    for place, example in enumerate(rows):
        if task == "seq2seq":
            example["labels"] = row(2, 7)
        elif task == "classification":
            example["labels"] = place % 4
    return rows


def arguments(folder, **changes) -> DistillationArguments:
    """Arguments of a quick training in `folder`."""
    quick = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "seed": 7}
    sizes = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 1, "learning_rate": 1e-3}
    return DistillationArguments(output_dir=str(folder), **{**quick, **sizes, **changes})


def trainer_of(student, source, task, folder, *, rows=None, **changes) -> DistillationTrainer:
    """A trainer on the ragged rows, padded on the right."""
    rows = examples(task) if rows is None else rows
    return DistillationTrainer(
        student,
        arguments(folder, **changes),
        teacher=source,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=RowCollator(0, task),
    )


@torch.no_grad()
def reference_means(student, teacher, task, rows, temperature) -> tuple[float, float, int]:
    """Mean cross-entropy and KL (without T^2) over the targets of all rows, and their number, one row at a time."""
    losses, divergences = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        if task == "seq2seq":
            labels = row["labels"]
            inputs = {"input_ids": ids, "decoder_input_ids": torch.tensor([[0, *labels[:-1]]])}
        elif task == "causal":
            labels, inputs = row["input_ids"][1:], {"input_ids": ids}
        else:
            labels, inputs = [row["labels"]], {"input_ids": ids}
        z, z_teacher = (
            model.eval()(**inputs).logits.double().reshape(-1, 4 if task == "classification" else 160)
            for model in (student, teacher)
        )
        for place, label in enumerate(labels):
            losses.append(-torch.log_softmax(z[place], -1)[label])
            q = torch.softmax(z[place] / temperature, -1)
            p = torch.softmax(z_teacher[place] / temperature, -1)
            divergences.append(sum(p[v] * (p[v].log() - q[v].log()) for v in range(len(p))))
    return float(sum(losses) / len(losses)), float(sum(divergences) / len(losses)), len(losses)


def weights_of(model) -> dict:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def left_padded(rows) -> dict:
    """A batch of causal rows padded on the left, with labels that forget about padding."""
    flipped = [torch.tensor(row["input_ids"]).flip(0) for row in rows]
    ids = pad_sequence(flipped, batch_first=True, padding_value=9).flip(1)
    mask = pad_sequence([torch.ones_like(row) for row in flipped], batch_first=True).flip(1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
