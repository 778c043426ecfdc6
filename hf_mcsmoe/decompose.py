"""Decompose the experts of a model that was merged before, usually after it has been recovered by training."""

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .decomposition import DECOMPOSITION
from .expert_decomposition import decompose_experts
from .families import find_layers, tied_layers
from .modeling.experts import is_same_layer
from .modeling.forms import check_forms
from .modeling.forms.low_rank_sparse import LowRankSparseExperts
from .modeling.offload import fetched
from .types import MoeLayer


@torch.no_grad()
def decompose_merged(
    model: PreTrainedModel, decomposition: str = "low_rank_sparse", *, progress: bool = True, **options: Any
) -> list[str]:
    """Make a low rank plus kept rows of every merged expert of a mapped model, in place; maps and routers stay.

    The second stage of MC-SMoE (Li et al., 2024, section 3.3, https://arxiv.org/abs/2310.01334) starts from the
    merged *and recovered* model, so it cannot be a step of the merging. With `keep_rows=1.0` the function of the model
    does not change beyond rounding: train it with `SparsityScheduleCallback`, which prunes the rows. Layers that were
    left as they are stay dense, as in the paper.

    Args:
        model: Of the mapped layout, with dense merged experts.
        decomposition: A rule in `DECOMPOSITION` that reads no calibration data.
        progress: Show a bar over the layers.
        options: Of the rule: `rank` or `parameter_ratio`, `keep_rows`, ...

    Returns:
        Paths of the decomposed experts modules.

    Raises:
        ValueError: The model is not of the mapped layout or has no dense merged experts, layers share them, their
            family cannot have other forms, an option is unknown, or the rule reads calibration data.
    """
    DECOMPOSITION.check_options(decomposition, options)
    if DECOMPOSITION.needs(decomposition):
        raise ValueError(
            f"decomposition {decomposition!r} reads calibration data, which is not collected here. Use "
            f"'low_rank_sparse', or give compress_moe a recipe with decomposition={decomposition!r}."
        )
    layers = merged_layers(model)
    tied = tied_layers(layers)
    if tied:
        raise ValueError(f"The layers {sorted(tied)} share their experts with others. Decompose before tying them.")
    for layer in layers:
        check_forms(layer)
    layouts = model.config.merged_sparse_moe["layers"]
    for layer in tqdm(layers, desc="decomposing", unit="layer", disable=not progress, delay=2):
        with fetched(layer.experts):
            stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
            factors, biases = decompose_experts(layer.family.view(layer, stacked), decomposition, options)
        changed = LowRankSparseExperts.install(layer, factors, biases)
        next(layout for name, layout in layouts.items() if is_same_layer(name, layer.name)).update(changed)
    return [layer.name for layer in layers]


def merged_layers(model: PreTrainedModel) -> list[MoeLayer]:
    """The layers of a mapped model whose experts were merged and are dense.

    Raises:
        ValueError: There are none.
    """
    layout = getattr(model.config, "merged_sparse_moe", None) or {"layers": {}}
    found = [x for x in find_layers(model) if any(is_same_layer(name, x.name) for name in layout["layers"])]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no dense merged experts to decompose. "
            "Compress it first: compress_moe(model, 'm-smoe', ...) with layout='mapped'."
        )
    return found
