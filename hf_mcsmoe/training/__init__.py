"""Training of compressed models: recovery by distillation, LoRA, and which rows of sparse parts stay."""

from .arguments import DistillationArguments
from .cache_writer import cache_teacher
from .cached_teacher import CachedTeacher
from .gradient_importance import prune_by_gradients
from .lora import lora_config
from .row_pruner import RowPruner, sparse_parts
from .schedule import cubic_schedule
from .sparsity import SparsityScheduleCallback
from .trainer import DistillationTrainer

__all__ = [
    "CachedTeacher",
    "DistillationArguments",
    "DistillationTrainer",
    "RowPruner",
    "SparsityScheduleCallback",
    "cache_teacher",
    "cubic_schedule",
    "lora_config",
    "prune_by_gradients",
    "sparse_parts",
]
