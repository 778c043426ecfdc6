"""Training of compressed models: which rows of sparse parts stay."""

from .gradient_importance import prune_by_gradients
from .row_pruner import RowPruner, sparse_parts
from .schedule import cubic_schedule
from .sparsity import SparsityScheduleCallback

__all__ = ["RowPruner", "SparsityScheduleCallback", "cubic_schedule", "prune_by_gradients", "sparse_parts"]
