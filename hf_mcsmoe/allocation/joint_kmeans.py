"""Neighbouring layers share a budget, which K-means over the experts of all of them divides."""

import torch
from torch import Tensor

from ..allocation import ALLOCATION
from ..option_checks import check_whole
from ..similarity.expert_outputs import output_cosine
from ..solvers.kmeans import kmeans
from ..types import LayerStatistics

CHECK_LAYERS = check_whole("joint_layers", 1, "1 gives each layer its own share.")


def check_budget(sizes: list[int], budgets: list[int], options: dict) -> None:
    """Nothing to refuse: any budget of 1 to N for each layer can be divided."""


@ALLOCATION.register(
    "joint_kmeans",
    needs=("every_expert_count", "output_cosine_sum"),
    check=CHECK_LAYERS,
    check_budget=check_budget,
)
def allocate_by_joint_kmeans(
    saliency_of_layer: list[Tensor],
    budget_of_layer: list[int],
    *,
    statistics_of_layer: list[LayerStatistics],
    seed: int,
    joint_layers: int = 2,
) -> list[int]:
    """Cluster the experts of `joint_layers` neighbouring layers together; each layer keeps as many as it has clusters.

    The adaptive budget of Sub-MoE (Li et al., 2025, https://arxiv.org/abs/2506.23266; 2 layers were best there). The
    paper's text does not say how experts of two layers are compared, so the reading is ours: an expert's point is its
    row of output cosines to the experts of its own layer, and 0 for those of the others. So clusters of two layers
    compete for the budget by how far apart their experts are, and none crosses layers as a rule; one that does counts
    for the layer of most of its members, the earlier one under ties.

    Args:
        saliency_of_layer: One (N,) tensor per layer; only the sizes are used.
        budget_of_layer: How many experts each layer would keep on average; their sum over each run of layers counts.
        statistics_of_layer: Of each layer.
        seed: Of K-means.
        joint_layers: Layers in a run; the last run may be shorter.

    Returns:
        Experts per layer, at least 1; each run spends its budget exactly.
    """
    if budget_of_layer == [len(saliency) for saliency in saliency_of_layer]:
        return list(budget_of_layer)  # nothing to divide; streaming has no statistics then
    allotted = []
    for start in range(0, len(budget_of_layer), joint_layers):
        rows = [output_cosine(one, None) for one in statistics_of_layer[start : start + joint_layers]]
        layer_of_point = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
        cluster_of_point = kmeans(torch.block_diag(*rows), sum(budget_of_layer[start : start + joint_layers]), seed)
        allotted += clusters_of_layers(layer_of_point, cluster_of_point, len(rows))
    return allotted


def clusters_of_layers(layer_of_point: Tensor, cluster_of_point: Tensor, num_layers: int) -> list[int]:
    """How many clusters belong to each layer, by most of their points; a layer without one gets one of the richest."""
    votes = torch.zeros(int(cluster_of_point.max()) + 1, num_layers, dtype=torch.int64)
    votes.index_put_((cluster_of_point, layer_of_point), torch.tensor(1), accumulate=True)
    counts = votes.argmax(dim=1).bincount(minlength=num_layers)
    for layer in (counts == 0).nonzero().flatten().tolist():
        counts[counts.argmax()] -= 1
        counts[layer] = 1
    return counts.tolist()
