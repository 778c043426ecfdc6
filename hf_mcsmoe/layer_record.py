"""What of a layer's statistics is kept beside the report, so that people can look at it and tools can read it."""

import torch
from torch import Tensor

from .modeling.offload import fetched
from .recipe import Recipe
from .similarity import SIMILARITY
from .types import LayerStatistics, MoeLayer

SELECTION_COUNT, SIMILARITY_OF_EXPERTS = "selection_count", "similarity"


@torch.no_grad()
def record_statistics(layer: MoeLayer, recipe: Recipe, statistics: LayerStatistics) -> dict[str, Tensor]:
    """How often each expert was chosen and, where the recipe looks at it, how alike each two of them are.

    Args:
        layer: As found in the original model, before it is compressed.
        recipe: Its similarity is the measure.
        statistics: Of the calibration tokens.

    Returns:
        By name, on the CPU: "<layer>.selection_count", (N,) int64, and "<layer>.similarity", (N, N) float32, if the
        recipe has one. float32 because experts that are all but equal, 0.9999 and 0.99995, are one number in float16;
        48 layers of 128 experts take 3.1 MB.
    """
    recorded = {f"{layer.name}.{SELECTION_COUNT}": statistics.selection_count.cpu()}
    if recipe.similarity is not None:
        similarity = similarity_of(layer, recipe, statistics)
        recorded[f"{layer.name}.{SIMILARITY_OF_EXPERTS}"] = similarity.to("cpu", torch.float32).contiguous()
    return recorded


def similarity_of(layer: MoeLayer, recipe: Recipe, statistics: LayerStatistics) -> Tensor:
    """The recipe's similarity of each two experts of a layer, (N, N)."""
    with fetched(layer.experts):
        weights = None
        if "weights" in SIMILARITY.needs(recipe.similarity):
            weights = layer.family.view(layer, layer.family.stack(layer, layer.expert_parameters))
        return SIMILARITY[recipe.similarity](statistics, weights, **recipe.similarity_options)
