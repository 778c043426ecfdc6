"""K-means whose clusters are never empty and whose labels do not depend on chance beyond a seed."""

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

MOST_ITERATIONS = 100
NUM_STARTS = 10


def kmeans(points: Tensor, num_clusters: int, seed: int, num_starts: int = NUM_STARTS) -> Tensor:
    """Lloyd's algorithm from several K-means++ starts; the one of least inertia counts, the first where several tie.

    An empty cluster takes the point that is farthest from its own centre, out of those that are not alone.

    Args:
        points: (n, d).
        num_clusters: In 1..n.
        seed: Of the starts (Arthur & Vassilvitskii, 2007, "k-means++").
        num_starts: How many.

    Returns:
        Cluster of each point, (n,) int64 in [0, `num_clusters`), numbered by their first points; none is empty.
    """
    values = points.double().cpu().numpy()
    generator = np.random.default_rng(seed)
    best, least = None, np.inf
    for _ in range(num_starts):
        label, inertia = lloyd(values, plus_plus(values, num_clusters, generator))
        if inertia < least:
            best, least = label, inertia
    _, first, cluster = np.unique(best, return_index=True, return_inverse=True)
    return torch.from_numpy(first.argsort().argsort()[cluster])


def plus_plus(points: np.ndarray, num_clusters: int, generator: np.random.Generator) -> np.ndarray:
    """Centres drawn from the points, each with a chance in proportion to its squared distance to those before it."""
    chosen = [int(generator.integers(len(points)))]
    squared = cdist(points, points[chosen], "sqeuclidean")[:, 0]
    while len(chosen) < num_clusters:
        total = squared.sum()
        if total > 0:
            chosen.append(int(generator.choice(len(points), p=squared / total)))
        else:  # every point is a centre already, or equal to one
            chosen.append(next(place for place in range(len(points)) if place not in chosen))
        squared = np.minimum(squared, cdist(points, points[chosen[-1:]], "sqeuclidean")[:, 0])
    return points[chosen]


def lloyd(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    """(cluster of each point, inertia) after at most `MOST_ITERATIONS` rounds; ties go to the lower cluster."""
    label = None
    for _ in range(MOST_ITERATIONS):
        squared = cdist(points, centres, "sqeuclidean")
        found = without_empty(squared.argmin(axis=1), squared)
        if label is not None and np.array_equal(found, label):
            break
        label = found
        centres = np.stack([points[label == cluster].mean(axis=0) for cluster in range(len(centres))])
    inertia = sum(((points[label == c] - centre) ** 2).sum() for c, centre in enumerate(centres))
    return label, float(inertia)


def without_empty(label: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """The same clusters, but those that are empty hold one point each: the farthest one that was not alone."""
    label = label.copy()
    own = squared[np.arange(len(label)), label]
    for cluster in range(squared.shape[1]):
        if (label == cluster).any():
            continue
        is_alone = np.bincount(label, minlength=squared.shape[1])[label] == 1
        label[np.where(is_alone, -1.0, own).argmax()] = cluster
    return label
