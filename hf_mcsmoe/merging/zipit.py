"""Neurons of all members that do the same become one, also two of one member."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..merging import MERGING
from ..observation.expert_activations import CHECK_TOKENS, MAX_TOKENS, activations, sums_over_tokens
from ..observation.observed import sum_dtype
from ..option_checks import check_all, check_whole
from ..solvers.agglomerative import cluster_by_distance
from ..solvers.down_fit import shares_of
from ..types import ExpertWeights

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens

CHECK_ZIPIT = check_all(
    check_whole("max_neurons", 1, "Its square times 16 bytes is the memory that a group takes."), CHECK_TOKENS
)


@MERGING.register("zipit", takes="experts", check=CHECK_ZIPIT)
def merge_by_zipping(
    members: ExpertWeights,
    importance: Tensor,
    *,
    tokens: "LayerTokens",
    max_neurons: int = 16_384,
    max_tokens: int = MAX_TOKENS,
) -> ExpertWeights:
    """Join the most correlated neurons, within and across members, until one expert's width is left.

    ZipIt! (Stoica et al., 2023, https://arxiv.org/abs/2305.03053) on what `down` is multiplied with, so that gate and
    up are merged alike. A cluster of neurons has the rows (sum of w_a row_a) / (sum of w_a) in gate and up: the merge
    matrix; and the column sum of s_i column_a in down: every neuron reads the merged one, the unmerge matrix, and the
    members' outputs are averaged by their shares s of the importance; w_a = s_i, or 1 where a cluster is of unused
    members. Deviations: clusters are joined by their mean correlation over all pairs, the paper's code takes a damped
    minimum; its budget for joins within one member is left out.

    Memory: 16 (m I)^2 bytes for the correlations and the clustering. Time: the activations of all members on T
    tokens, T (m I)^2, and O((m I)^2) for the clustering.

    Args:
        members: (m, ...) float32; the order of their neurons does not matter.
        importance: (m,), >= 0. All 0 counts the dominant expert alone.
        tokens: The kept tokens of the layer, whatever expert the router chose for them.
        max_neurons: Most neurons m I of a group.
        max_tokens: How many of the kept tokens count, at even distances.

    Returns:
        One expert, float32.

    Raises:
        ValueError: The members have more than `max_neurons` neurons together.
    """
    num_members, width = members.up.shape[:2]
    if num_members * width > max_neurons:
        raise ValueError(
            f"max_neurons is {max_neurons}, but a group of {num_members} experts has {num_members * width} neurons. "
            "Make smaller groups (grouping='pseudo_pruning' has a group_size, or keep more experts), or raise it."
        )
    device, dtype = members.up.device, sum_dtype(members.up.device)
    shares = shares_of(importance, device).to(dtype)
    cluster = cluster_by_distance(1 - correlations(members, tokens, max_tokens), width).to(device)
    share_of_neuron = shares.repeat_interleave(width)
    weight = torch.where(sum_by(cluster, share_of_neuron, width)[cluster] > 0, share_of_neuron, 1.0)
    weight = weight / sum_by(cluster, weight, width)[cluster]
    merged = {}
    for name, tensor in members.tensors().items():
        if name == "down_bias":
            merged[name] = torch.tensordot(shares, tensor.to(dtype), dims=1)
        elif name == "down":
            columns = tensor.transpose(1, 2).flatten(0, 1).to(dtype)
            merged[name] = sum_by(cluster, share_of_neuron[:, None] * columns, width).T
        else:
            rows = tensor.flatten(0, 1).to(dtype)
            merged[name] = sum_by(cluster, (weight[:, None] if rows.dim() == 2 else weight) * rows, width)
    return ExpertWeights(**{name: tensor[None].float() for name, tensor in merged.items()})


def sum_by(cluster: Tensor, values: Tensor, num_clusters: int) -> Tensor:
    """Sums of values (n, ...) over the items of each cluster, (num_clusters, ...)."""
    return values.new_zeros(num_clusters, *values.shape[1:]).index_add_(0, cluster, values)


def correlations(members: ExpertWeights, tokens: "LayerTokens", max_tokens: int = MAX_TOKENS) -> Tensor:
    """Pearson correlation of the activations of all neurons of all members, (m I, m I) float64.

    A neuron that never changes has the correlation 0 with all others.
    """

    def products(hidden_states: Tensor) -> tuple[Tensor, ...]:
        found = [activations(members, member, hidden_states, tokens) for member in range(members.num_experts)]
        both = torch.cat(found, dim=1)
        return both.T @ both, both.sum(dim=0)

    num_neurons = members.num_experts * members.width
    num_tokens, sums = sums_over_tokens(tokens, members.up.device, max_tokens, products)
    if num_tokens == 0:
        return torch.eye(num_neurons, dtype=torch.float64)
    covariance = sums[0] / num_tokens - torch.outer(sums[1], sums[1]) / num_tokens**2
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.outer(deviation, deviation)
    return torch.where(scale > 0, covariance / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-1, 1)
