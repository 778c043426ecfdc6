"""What of a layer's statistics is kept beside the report, so that people can look at it and tools can read it."""

import torch
from torch import Tensor

from ..types import LayerStatistics

SELECTION_COUNT, SIMILARITY_OF_EXPERTS = "selection_count", "similarity"


def record_statistics(layer: str, statistics: LayerStatistics, similarity: Tensor | None) -> dict[str, Tensor]:
    """How often each expert was chosen and, where the recipe looks at it, how alike each two of them are.

    Args:
        layer: Its name.
        statistics: Of the calibration tokens.
        similarity: (N, N), by the recipe's measure; None: it has none.

    Returns:
        By name, on the CPU: "<layer>.selection_count", (N,) int64, and "<layer>.similarity", (N, N) float32.
        float32 because experts that are all but equal, 0.9999 and 0.99995, are one number in float16; 48 layers of
        128 experts take 3.1 MB.
    """
    recorded = {f"{layer}.{SELECTION_COUNT}": statistics.selection_count.cpu()}
    if similarity is not None:
        recorded[f"{layer}.{SIMILARITY_OF_EXPERTS}"] = similarity.to("cpu", torch.float32).contiguous()
    return recorded
