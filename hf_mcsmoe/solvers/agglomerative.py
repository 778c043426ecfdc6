"""Agglomerative clustering: the closest two clusters become one until as many are left as asked for."""

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage as link
from scipy.spatial.distance import squareform
from torch import Tensor

LINKAGES = ("average", "complete", "single")


def cluster_by_distance(distances: Tensor, num_clusters: int, linkage: str = "average") -> Tensor:
    """Join the two closest clusters again and again.

    Args:
        distances: (n, n) symmetric; the diagonal is not used.
        num_clusters: How many are left, in 1..n. Exact also where distances tie: joins are undone from the last one.
        linkage: Distance of two clusters: the "average", the largest ("complete") or the smallest ("single") over
            all pairs of their members.

    Returns:
        Cluster of each item, (n,) int64, numbered by their first items. The same for the same distances.
        Memory: 8 n^2 bytes.
    """
    num_items = len(distances)
    label = torch.arange(num_items)
    if num_clusters < num_items:
        condensed = squareform(distances.cpu().double().numpy(), checks=False)
        joins = link(condensed, method=linkage)[: num_items - num_clusters, :2].astype(np.int64)
        # Row r joins two clusters to the one of number n + r; every cluster here is known by one of its items.
        item_of_cluster = list(range(num_items))
        for first, second in joins.tolist():
            kept, gone = sorted((root(label, item_of_cluster[first]), root(label, item_of_cluster[second])))
            label[gone] = kept
            item_of_cluster.append(kept)
    roots = torch.tensor([root(label, item) for item in range(num_items)])
    return roots.unique(return_inverse=True)[1]


def root(label: Tensor, item: int) -> int:
    """The item that stands for the cluster of `item`, where `label` leads from item to item."""
    while label[item] != item:
        item = int(label[item])
    return item
