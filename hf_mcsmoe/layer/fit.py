"""Choosing the neurons of a layer and fitting its down projections, on what the layer was given in calibration."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..observation.beside_experts import BesideExperts, joint_down, joint_offsets, with_joint_down
from ..observation.gated_features import (
    Activation,
    FeatureSums,
    add_outputs,
    dense_gates,
    output_of_biases,
    sum_expert_grams,
    sum_features,
)
from ..observation.held_out_error import HeldOutError
from ..observation.kept_features import KeptFeatures
from ..observation.layer_inputs import LayerInputs, choice
from ..observation.sinks import with_bounded_sinks
from ..observation.token_batches import RoutedTokens, in_chunks
from ..recipe import Recipe
from ..refit import REFIT
from ..selection import SELECTION
from ..types import MoeLayer
from .parts import in_parts
from .refit_by_passes import RIDGE, refit_by_passes
from .unreached import with_unreached

LEAST_SHARE = 1 / 8  # of an equal share of the neurons: what an expert keeps whatever calibration says of it

MOST_JOINT_NEURONS = 8192  # of a layer: its joint Gram matrix takes 0.5 GB, its factorization as much again


@dataclass(frozen=True, eq=False)
class FittedExperts:
    """Experts after selection and refit, and what held-out tokens say about the refit."""

    experts: PackedExperts  # float32
    error_before_refit: float | None  # relative squared error on held-out tokens; None: no refit, or no tokens
    error_after_refit: float | None
    is_refitted: bool  # False where the refit did not lower the held-out error: it was dropped
    beside: BesideExperts | None = None  # what the refit found for the shared expert and for constants


@torch.no_grad()
def with_answers(features: KeptFeatures) -> list[RoutedTokens]:
    """The batches of `features` with what their experts give for them as targets, (t, D) float32 a batch."""
    experts, batches = features.experts, features.batches
    device, outputs = experts.up.device, []
    for chunk, found in zip(in_chunks(batches), features, strict=True):
        output = output_of_biases(experts, chunk.gates.to(device))
        output = torch.zeros(chunk.hidden_states.shape, device=device) if output is None else output
        outputs.append(add_outputs(experts.down, experts.offsets.tolist(), found, output))
    targets = torch.cat(outputs).split([len(batch.gates) for batch in batches]) if outputs else ()
    return [dataclasses.replace(b, targets=answer) for b, answer in zip(batches, targets, strict=True)]


def routed_tokens(
    layer: MoeLayer, inputs: LayerInputs, assignment: Tensor, targets: list[Tensor | None], *, reroute: bool
) -> list[RoutedTokens]:
    """What the experts of a compressed layer see and should give, batch by batch.

    Args:
        layer: With the router that the result will have.
        inputs: What the layer was given.
        assignment: (slots, M) float32: 1 where a slot of the router goes to an expert.
        targets: What they should give, batch by batch; None where nobody asks.
        reroute: The router is not the one whose choice was kept.
    """
    tokens = []
    for position, (hidden_states, _, _) in enumerate(inputs.experts_inputs):
        index, weights = choice(layer, inputs, position, reroute)
        gates = dense_gates(index, weights, len(assignment))
        tokens.append(RoutedTokens(hidden_states, gates @ assignment.to(gates.device), targets[position]))
    return tokens


@torch.no_grad()
def fit_experts(
    experts: PackedExperts,
    activation: Activation,
    recipe: Recipe,
    num_neurons: int,
    tokens: list[RoutedTokens],
    held_out: list[RoutedTokens],
    supply: Mapping[str, Callable[[], Any]] | None = None,
    known: KeptFeatures | None = None,
    beside: BesideExperts | None = None,
    saliency: Tensor | None = None,
) -> FittedExperts:
    """Select neurons and refit the down projections, as the recipe says.

    Args:
        experts: M experts, float32.
        activation: From `MoeFamily.activation`.
        recipe: `selection` and `refit`.
        num_neurons: How many neurons stay in all.
        tokens: What the experts will see under the gates of the result, and what the layer should give.
        held_out: The same for other tokens; may be empty.
        supply: What else a selection may ask for, beside "grams", "sums" of features and the "budget".
        known: Features that may be those of `experts` on `tokens`.
        beside: What the refit fits beside the experts.
        saliency: Of all neurons, (P,), where it is known already; None asks the selection.
    """
    tokens, held_out = with_bounded_sinks(tokens), with_bounded_sinks(held_out)
    is_known = known is not None and known.serves(experts, tokens)
    features = known if is_known else KeptFeatures(experts, activation, tokens)
    columns = sums = None
    if recipe.selection is not None and num_neurons < experts.num_neurons:
        is_uniform = recipe.layout == "native"
        budget = num_neurons // experts.num_experts if is_uniform else num_neurons
        least = least_width(budget, experts.num_experts, is_uniform)
        if saliency is None:
            if "sums" in SELECTION.asks_for(recipe.selection) and experts.num_neurons <= MOST_JOINT_NEURONS:
                sums = sum_features(experts, activation, tokens, features)
            # Costs of neurons of all experts compare, so parts of one may be judged as if they were experts.
            judged, seen = in_parts(experts, tokens)
            supply = {
                "grams": lambda: grams_of(
                    features if judged is experts else KeptFeatures(judged, activation, seen), sums
                ),
                "sums": lambda: sums,
                "budget": lambda: (num_neurons, least),
                **(supply or {}),
            }
            saliency = SELECTION.call(recipe.selection, judged, options=recipe.selection_options, supply=supply)
        saliency = saliency.to(experts.up.device)
        kept = choose_neurons(saliency, experts.offsets.tolist(), budget, is_uniform)
        experts, columns = experts.select_neurons(kept), features.of_neurons(kept)
        sums = sums if sums is None else sums.of_neurons(kept)
    if recipe.refit is None:
        return FittedExperts(experts, None, None, False)
    return refit_down(experts, activation, recipe, tokens, held_out, columns or features, beside, sums)


def grams_of(features: KeptFeatures, sums: FeatureSums | None = None) -> list[Tensor]:
    """For each expert the Gram of its gated neurons, (width, width) float64, also where no token reached it.

    `sums` are those of the same features, where they are at hand.
    """
    of_what = (features.experts, features.activation, features.batches)
    if sums is None:
        return with_unreached(sum_expert_grams(*of_what, features), *of_what)
    blocks = itertools.starmap(slice, itertools.pairwise(features.experts.offsets.tolist()))
    return with_unreached([sums.gram[block, block] for block in blocks], *of_what)


def choose_neurons(saliency: Tensor, offsets: Sequence[int], budget: int, is_uniform: bool) -> Tensor:
    """The most salient neurons, (P',) int64 ascending; ties go to the lower one.

    Args:
        saliency: (P,).
        offsets: Where experts start, M + 1 numbers.
        budget: Neurons that stay, of all experts together; with `is_uniform` of each expert.
        is_uniform: Every expert keeps the same number. Otherwise each keeps at least `LEAST_SHARE` of what it would
            have if all kept the same, rounded down: calibration data is never all that a model is used for.
    """
    least = least_width(budget, len(offsets) - 1, is_uniform)
    kept = [
        start + saliency[start:end].argsort(descending=True, stable=True)[:least]
        for start, end in itertools.pairwise(offsets)
    ]
    kept = torch.cat(kept)
    if not is_uniform:
        is_left = torch.ones_like(saliency, dtype=torch.bool).index_fill(0, kept, False)
        ranked = saliency.argsort(descending=True, stable=True)
        kept = torch.cat([kept, ranked[is_left[ranked]][: budget - kept.numel()]])
    return kept.sort().values


def least_width(budget: int, num_experts: int, is_uniform: bool) -> int:
    """Neurons that each expert keeps at least, see `choose_neurons`."""
    return budget if is_uniform else math.floor(LEAST_SHARE * budget / num_experts)


@torch.no_grad()
def refit_down(
    experts: PackedExperts,
    activation: Activation,
    recipe: Recipe,
    tokens: list[RoutedTokens],
    held_out: list[RoutedTokens],
    features: Iterable[list[tuple[Tensor, Tensor]]] | None = None,
    beside: BesideExperts | None = None,
    sums: FeatureSums | None = None,
) -> FittedExperts:
    """The experts with new down projections, unless held-out tokens say that the old ones were better.

    Above `MOST_JOINT_NEURONS` the joint Gram matrix is not built: see `refit_by_passes`, which takes the first of the
    option `ridges`. `features` are those of `experts` on `tokens`, and `sums` theirs without those of `beside`, where
    they are at hand. `beside` is fitted with them, from what it is, and stays or goes with them. No token counts more
    than `with_bounded_sinks` allows.
    """
    tokens, held_out = with_bounded_sinks(tokens), with_bounded_sinks(held_out)
    judge = HeldOutError(experts, activation, held_out, beside) if held_out else None
    offsets, down = joint_offsets(experts, beside), joint_down(experts, beside)
    if offsets[-1] > MOST_JOINT_NEURONS:
        ridge = recipe.refit_options.get("ridges", (RIDGE,))[0]
        parts, seen = in_parts(experts, tokens)
        best = refit_by_passes(parts, activation, seen, ridge, beside)
    else:
        if sums is None or beside is not None:
            sums = sum_features(experts, activation, tokens, features, beside)
        best = REFIT[recipe.refit](sums, judge, offsets, down.to(sums.gram.dtype), **recipe.refit_options)
    best = best.float()
    before, after = (judge.relative(one) if judge else None for one in (down, best))
    if before is not None and after >= before:
        return FittedExperts(experts, before, after, False, beside)
    experts, beside = with_joint_down(experts, beside, best)
    return FittedExperts(experts, before, after, True, beside)
