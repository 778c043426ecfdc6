"""The routers keep the rows of the dominant experts."""

from torch import Tensor

from ...types import ExpertGroups
from ..treatments import TREATMENTS


@TREATMENTS.register("dominant_rows")
def dominant_rows(name: str, tensor: Tensor, groups: ExpertGroups, usage_frequency: Tensor) -> Tensor:
    """The entry of the dominant expert of each group, bit by bit; the others go.

    As REAP (https://arxiv.org/abs/2510.13999) does for the experts that it prunes, and the native layout of
    `compress_moe`. The gate mass of a group's other members is lost to it.

    Args:
        name: Not read.
        tensor: (N, ...), any dtype.
        groups: Which slots became one.
        usage_frequency: Not read.

    Returns:
        (M, ...).
    """
    return tensor.index_select(0, groups.dominant_of_group.to(tensor.device))
