"""A teacher that computes beside the student: never trained, wrapped or saved."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..loading import load_model
from ..modeling.offload import execution_device
from .arguments import DistillationArguments
from .cached_teacher import INDEX, LOG_PROB, CachedTeacher
from .targets import Task

CACHE_ENDING = ".safetensors"
NOT_INPUTS = ("labels", "shift_labels", "num_items_in_batch", INDEX, LOG_PROB)


class LiveTeacher:
    """A model in evaluation mode that is asked without gradients, in its own dtype and on its own devices.

    Accelerate's mixed precision does not reach it: load it in the dtype that it shall compute in.

    Args:
        model: With or without a device map.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()
        names = inspect.signature(model.forward).parameters
        # A cache of keys and values is memory for nothing; classifiers and language models alike take the argument.
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values())
        self._options = {"use_cache": False} if takes_any or "use_cache" in names else {}

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], **options: Any) -> Any:
        """The model's output for inputs on any device; `options` are more arguments of its forward."""
        device = execution_device(self.model.get_input_embeddings())
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        return self.model(**moved, **self._options, **options)


def open_teacher(
    teacher: PreTrainedModel | CachedTeacher | str | Path | None,
    student: PreTrainedModel,
    task: Task,
    args: DistillationArguments,
) -> LiveTeacher | CachedTeacher | None:
    """Whatever a user gives as teacher, checked against the student.

    Args:
        teacher: A model (moved to the device of the training unless it has a device map), its folder or Hub id, a file
            of `cache_teacher`, or None for none.
        student: What will be trained.
        task: Of the student.
        args: dtype and devices of a model that is loaded here; temperature and weights, for the checks.

    Raises:
        FileNotFoundError: No such folder, file or model.
        TypeError: None of the above.
        ValueError: Another vocabulary or task, another temperature in the file, the student itself, or a term of the
            loss that the teacher cannot give.
    """
    if teacher is None or isinstance(teacher, nn.Module | CachedTeacher):
        opened = teacher
    elif isinstance(teacher, str | Path):
        opened = _read(teacher, args)
    else:
        raise TypeError(
            f"teacher cannot be {type(teacher).__name__}; allowed are a model, its folder or Hub id, and a file of "
            "cached logits. Load it with from_pretrained."
        )
    features = {name: getattr(args, name) for name in ("hidden_state_weight", "router_weight")}
    wanted = [f"{name}={value}" for name, value in features.items() if value > 0]
    if wanted and not isinstance(opened, nn.Module):
        kind = "no teacher" if opened is None else "a file of cached logits"
        raise ValueError(f"{wanted[0]} needs a live teacher, but there is {kind}. Set it to 0, or pass a model.")
    if opened is None and args.task_weight == 0:
        raise ValueError("task_weight is 0 and there is no teacher, so there is no loss. Pass a teacher.")
    if isinstance(opened, CachedTeacher):
        _check_cache(opened, student, task, args.temperature)
        return opened
    if opened is None:
        return None
    _check_model(opened, student, task)
    if getattr(opened, "hf_device_map", None) is None:
        opened.to(args.device)
    return LiveTeacher(opened)


def is_cache_file(path: Path) -> bool:
    """Whether a path means cached logits, not a model."""
    return path.suffix == CACHE_ENDING or path.is_file()


def _read(teacher: str | Path, args: DistillationArguments) -> PreTrainedModel | CachedTeacher:
    path = Path(teacher).expanduser()
    if is_cache_file(path):
        return CachedTeacher(path)
    device_map = args.teacher_device_map or {"": args.device}
    return load_model(teacher, dtype=args.teacher_dtype, device_map=device_map)


def vocabulary(model: PreTrainedModel, task: Task) -> int:
    """V: tokens or classes that a model tells apart."""
    return model.config.num_labels if task == "classification" else model.config.get_text_config().vocab_size


def _check_model(teacher: PreTrainedModel, student: PreTrainedModel, task: Task) -> None:
    if teacher is student:
        raise ValueError("The teacher is the student itself. Load the original model once more, or pass its path.")
    if teacher.config.is_encoder_decoder != student.config.is_encoder_decoder:
        raise ValueError(
            f"The teacher is {type(teacher).__name__}, the student {type(student).__name__}: only one of them has an "
            "encoder and a decoder. Distil from the model that was compressed."
        )
    sizes = [vocabulary(model, task) for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        what = "classes" if task == "classification" else "tokens in its vocabulary"
        raise ValueError(
            f"The teacher has {sizes[0]} {what}, the student {sizes[1]}. Distil from the model that was compressed."
        )


def _check_cache(cached: CachedTeacher, student: PreTrainedModel, task: Task, temperature: float) -> None:
    found = cached.description
    expected = {"task": task, "vocab_size": vocabulary(student, task), "temperature": temperature}
    for name, value in expected.items():
        if getattr(found, name) != value:
            remedy = f"Set temperature={found.temperature}, or make" if name == "temperature" else "Make"
            raise ValueError(
                f"{str(cached.path)!r} has {name}={getattr(found, name)!r}, but the training {value!r}. "
                f"{remedy} the file for this training."
            )


def model_inputs(batch: Mapping[str, Any], targets: Tensor, task: Task, model: PreTrainedModel) -> dict[str, Any]:
    """What both models are called with: no labels, so that neither computes a loss of its own.

    Args:
        batch: As the collator gave it.
        targets: See `targets_of`.
        task: Of the model; a sequence-to-sequence model gets the decoder inputs that belong to its targets.
        model: Knows how to shift targets into decoder inputs.
    """
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    if task == "seq2seq" and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=targets)
    return inputs
