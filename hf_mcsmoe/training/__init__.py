"""Training after compression: recovery by distillation with transformers' Trainer."""

from .arguments import DistillationArguments
from .cache_writer import cache_teacher
from .cached_teacher import CachedTeacher
from .trainer import DistillationTrainer

__all__ = ["CachedTeacher", "DistillationArguments", "DistillationTrainer", "cache_teacher"]
