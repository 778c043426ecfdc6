"""Each weight of a group's experts by how much the loss depends on it."""

from torch import Tensor

from ..merging import MERGING
from ..solvers.entrywise_mean import entrywise_mean, of_tensors
from ..types import ExpertWeights, LayerStatistics, permute


@MERGING.register("fisher", needs=("fisher",), takes="experts")
def merge_by_fisher(
    experts: ExpertWeights, importance: Tensor, *, members: Tensor, order: Tensor | None, statistics: LayerStatistics
) -> ExpertWeights:
    """W = sum_i F_i * W_i / sum_i F_i, weight by weight, F_i the diagonal Fisher information of member i.

    Fisher merging (Matena & Raffel, 2022, https://arxiv.org/abs/2111.09832), an ablation of M-SMoE (Li et al., 2024,
    https://arxiv.org/abs/2310.01334), where it did worst. There F is the mean over samples of the squared gradient of
    a whole sample; here the squares are taken token by token, in one backward a batch. Where no member has any Fisher
    information (never used, or neurons that do not matter) the plain mean is taken; public code has an epsilon that
    makes such weights 0.

    Args:
        experts: The m members, aligned, float32, the dominant first.
        importance: Not used: frequency is in the sums.
        members: Which of the N experts they are, (m,) int64.
        order: The alignment of all N experts, (N, I) int64, or None.
        statistics: Of the N experts, not aligned.

    Returns:
        The merged expert, with a leading axis of 1.
    """
    information = of_tensors(statistics["fisher"][members], experts)
    merged = {}
    for name, tensor in experts.tensors().items():
        of_tensor = information[name] if order is None else permute(name, information[name], order[members])
        merged[name] = entrywise_mean(tensor, of_tensor)[None]
    return ExpertWeights(**merged)
