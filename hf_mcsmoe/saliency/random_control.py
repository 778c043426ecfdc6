"""A control: experts in random order."""

import torch
from torch import Tensor

from ..saliency import SALIENCY
from ..types import ExpertWeights, LayerStatistics


@SALIENCY.register("random", needs=("selection_count",))
def random_order(statistics: LayerStatistics, weights: ExpertWeights, *, seed: int = 0) -> Tensor:
    """Uniform random numbers, (N,) float64.

    Args:
        statistics: Its counts enter the seed, so that layers of one model draw different numbers.
        weights: Not used.
        seed: Another one gives another order.
    """
    count = statistics.selection_count
    place = torch.arange(1, count.numel() + 1)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + int((count * place).sum())) % 2**63)
    return torch.rand(count.numel(), generator=generator, dtype=torch.float64)
