"""What the refit of a layer changes beside its routed experts: the shared expert, and constants of dropped slots."""

import dataclasses
import functools

import torch
from torch import Tensor

from ..executors.in_memory import Collected
from ..modeling.constant_outputs import fill_constants
from ..modeling.offload import execution_device, fetched, replace_tensor
from ..observation.beside_experts import BesideExperts
from ..observation.layer_inputs import LayerInputs
from ..observation.shared_features import routed_scale, shared_features
from ..observation.token_batches import RoutedTokens
from ..recipe import Recipe
from ..refit import REFIT
from ..types import MoeLayer, SharedExpert


def beside_experts(
    layer: MoeLayer, recipe: Recipe, collected: Collected, constants: Tensor | None
) -> BesideExperts | None:
    """What a refit fits beside the routed experts, unchanged as yet; None for nothing.

    Call it while the layer is the original: its block is run on a few tokens.

    Args:
        layer: As found.
        recipe: With the refit, and its option `shared_expert`.
        collected: What the layer was given.
        constants: Of dropped slots, (R, D); None: they add nothing.
    """
    if recipe.refit is None:
        return None
    features, width = None, shared_width(layer, recipe)
    if width:
        scale = routed_scale(layer, collected.calibration if collected.held_out.is_empty else collected.held_out)
        width = 0 if scale is None else width
        features = None if scale is None else functools.partial(scaled_features, layer.shared, 1 / scale)
    num_constants = 0 if constants is None else len(constants)
    if width + num_constants == 0:
        return None
    change = torch.zeros(width + num_constants, layer.hidden_size, device=execution_device(layer.experts))
    return BesideExperts(features, (width, num_constants), change)


def shared_width(layer: MoeLayer, recipe: Recipe) -> int:
    """Neurons of the shared expert that the refit of a recipe fits, if the block turns out to add its output; or 0."""
    if layer.shared is None or recipe.refit is None:
        return 0
    options = REFIT.options(recipe.refit) | recipe.refit_options
    return layer.shared.down.in_features if options.get("shared_expert") else 0


def scaled_features(shared: SharedExpert, scale: float, hidden_states: Tensor) -> Tensor:
    """`shared_features` times a number, which makes them features of what the block multiplies with its inverse."""
    features = shared_features(shared, hidden_states)
    return features if scale == 1 else features * scale


@torch.no_grad()
def write_beside(layer: MoeLayer, beside: BesideExperts | None, constants: Tensor | None) -> BesideExperts | None:
    """Store constants, and add what the refit found to them and to the last matrix of the shared expert; in place.

    Each number is rounded once to the dtype that it is stored in.

    Args:
        layer: With its new experts.
        beside: What the refit found; None: nothing.
        constants: Of dropped slots before the refit, (R, D) float64; None: they add nothing.

    Returns:
        `beside` with the change of the shared expert that is left after rounding, and without constants; None where
        nothing was found for the shared expert, which is then as it was.
    """
    if constants is not None:
        fill_constants(layer.experts, constants if beside is None else constants + beside.changes[1].to(constants))
    if beside is None or not beside.changes[0].any():
        return None
    down, change = layer.shared.down, beside.changes[0]
    with fetched(down):
        old = down.weight.detach()
        new = (old.float() + change.T.to(old.device)).to(old.dtype)
        rounded = (new.float() - old.float()).T.to(change.device)
    replace_tensor(down, "weight", new)
    return dataclasses.replace(beside, widths=(len(change), 0), change=rounded)


def with_change(outputs: list[Tensor], changed: BesideExperts | None, inputs: LayerInputs) -> list[Tensor]:
    """What routed experts give for the kept tokens, with what the shared expert gives more than before."""
    if changed is None:
        return outputs
    tokens = [RoutedTokens(hidden_states, weights, None) for hidden_states, _, weights in inputs.experts_inputs]
    return [output.float() + changed.output(batch) for output, batch in zip(outputs, tokens, strict=True)]
