"""Decompose the experts of a model that was merged before, usually after it has been recovered by training."""

from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .calibration import load_calibration
from .decomposition import DECOMPOSITION
from .executors.in_memory import collect
from .families import find_layers, reading_part, tied_layers
from .layer.expert_decomposition import decompose_experts
from .modeling.experts import is_same_layer
from .modeling.forms import check_forms
from .modeling.forms.low_rank_sparse import LowRankSparseExperts
from .modeling.offload import fetched
from .observation.input_grams import input_grams
from .recipe import Recipe
from .sizes import expert_size
from .types import MoeLayer


@torch.no_grad()
def decompose_merged(
    model: PreTrainedModel,
    decomposition: str = "low_rank_sparse",
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    tokens: int = 65_536,
    progress: bool = True,
    **options: Any,
) -> list[str]:
    """Make a low rank plus kept rows of every merged expert of a mapped model, in place; maps and routers stay.

    The second stage of MC-SMoE (Li et al., 2024, section 3.3, https://arxiv.org/abs/2310.01334) starts from the
    merged *and recovered* model, so it cannot be a step of the merging. With `keep_rows=1.0` the function of the model
    does not change beyond rounding: train it with `SparsityScheduleCallback`, which prunes the rows, or let
    `prune_by_gradients` do it without training. Layers that were left as they are stay dense, as in the paper.

    Args:
        model: Of the mapped layout, with dense merged experts.
        decomposition: A rule in `DECOMPOSITION`.
        calibration: For a rule that reads what the experts are given ("whitened_low_rank_sparse"): whatever
            `load_calibration` takes, and the model runs over it once; other rules do not look at it.
        tokenizer: For text in `calibration`.
        tokens: About how many calibration tokens each layer keeps: D + k numbers for each.
        progress: Show bars over batches and layers.
        options: Of the rule: `rank` or `parameter_ratio`, `keep_rows`, ...

    Returns:
        Paths of the decomposed experts modules.

    Raises:
        ValueError: The model is not of the mapped layout or has no dense merged experts, layers share them, their
            family cannot have other forms, an option is unknown or out of range, or there is no calibration data for
            a rule that needs it. The model is as it was.
    """
    DECOMPOSITION.check_options(decomposition, options)
    if DECOMPOSITION.trait(decomposition, "ranked"):
        raise ValueError(
            f"decomposition {decomposition!r} needs the importance of experts, which comes from calibrating the "
            "original model. Name it in the recipe that compresses that."
        )
    reads_inputs = bool(DECOMPOSITION.needs(decomposition))
    if reads_inputs and calibration is None:
        raise ValueError(
            f"decomposition {decomposition!r} minimises the error of outputs, but calibration is None. "
            "Give calibration data, or use decomposition 'low_rank_sparse', which needs none."
        )
    layers = merged_layers(model)
    check_decomposition(layers, decomposition, options)
    inputs = {}
    if reads_inputs:
        table = reading_part(model).get_input_embeddings()
        data = load_calibration(calibration, tokenizer, held_out_fraction=0, vocab_size=table.num_embeddings)
        collected = collect(model, layers, data, frozenset(), calibration_tokens=tokens, progress=progress)
        inputs = {name: one.calibration for name, one in collected.items()}
    layouts = model.config.merged_sparse_moe["layers"]
    for layer in tqdm(layers, desc="decomposing", unit="layer", disable=not progress, delay=2):
        grams = input_grams(layer, inputs.pop(layer.name)) if reads_inputs else None
        with fetched(layer.experts):
            stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
            factors, biases = decompose_experts(layer.family.view(layer, stacked), decomposition, options, grams)
        changed = LowRankSparseExperts.install(layer, factors, biases)
        next(layout for name, layout in layouts.items() if is_same_layer(name, layer.name)).update(changed)
    return [layer.name for layer in layers]


def check_decomposition(layers: list[MoeLayer], decomposition: str, options: Mapping[str, Any]) -> None:
    """Refuse merged layers that cannot be decomposed that way.

    Raises:
        ValueError: They share experts, their family cannot have other forms, or the options do not fit their sizes.
    """
    tied = tied_layers(layers)
    if tied:
        raise ValueError(f"The layers {sorted(tied)} share their experts with others. Decompose before tying them.")
    recipe = Recipe(decomposition=decomposition, decomposition_options=dict(options))
    for layer in layers:
        check_forms(layer)
        expert_size(layer, recipe)


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
