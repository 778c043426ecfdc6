"""The plain mean of a group's members."""

from torch import Tensor

from ..merging import MERGING


@MERGING.register("average")
def merge_by_average(members: Tensor, importance: Tensor) -> Tensor:
    """Average the experts of one group, all alike: an ablation of M-SMoE (https://arxiv.org/abs/2310.01334).

    Args:
        members: (m, O, I) float32, aligned; row 0 is the dominant expert.
        importance: Not used.

    Returns:
        The merged matrix, (O, I) float32.
    """
    return members.mean(dim=0)
