"""The few experts whose enormous outputs the rest of a model relies on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..protection import PROTECTION
from ..types import LayerStatistics


def check(options: dict[str, Any]) -> None:
    """Raise ValueError for an option of `find_super_experts` that is out of bounds."""
    for name, least, most in (("percentile", 0, 100), ("ratio", 0, 1), ("first_layers", 0, 1)):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(
                f"{name} of protection 'super_experts' is {value!r}, it must be in [{least}, {most}]. "
                "Leave it out for the published value."
            )


@PROTECTION.register("super_experts", needs=("output_max",), check=check)
def find_super_experts(
    statistics_of_layer: Sequence[LayerStatistics],
    *,
    percentile: float = 99.5,
    ratio: float = 0.1,
    first_layers: float = 0.75,
) -> list[Tensor]:
    """Experts whose largest output is above both thresholds of all experts of the model together.

    With A the largest |f_i(x_t)[d]| of an expert over calibration tokens and dimensions, a super expert has
    A > the 99.5th percentile of all A, and A > max(A) / 10, and is in the first 75 % of the layers ("Unveiling super
    experts in mixture-of-experts large language models", 2025, https://arxiv.org/abs/2507.23279). They make the
    massive activations of attention sinks; a model without them repeats itself. The absolute value is taken: public
    code has a signed maximum and one threshold only. Layers are counted among those that are compressed.

    Args:
        statistics_of_layer: Of the layers in the order of the model.
        percentile: Of all A, with linear interpolation.
        ratio: Of the largest A.
        first_layers: Share of the layers; the number is rounded up.

    Returns:
        (N,) bool for each layer.
    """
    largest = [statistics["output_max"].double() for statistics in statistics_of_layer]
    everything = torch.cat(largest)
    threshold = torch.maximum(torch.quantile(everything, percentile / 100), ratio * everything.max())
    return [(maxima > threshold) & (place < first_layers * len(largest)) for place, maxima in enumerate(largest)]
