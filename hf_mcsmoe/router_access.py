"""The rows of a router: where they are, whether a rule for them is defined, and what they are multiplied with."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .modeling.experts import slot_axis
from .modeling.forms.base import meta_copy
from .modeling.offload import execution_device, fetched, replace_tensor
from .observation.layer_inputs import LayerInputs
from .observation.observed import sum_dtype
from .router_rows import ROUTER_ROWS
from .types import MoeLayer

PROBE_TOKENS = 16


@dataclass(frozen=True)
class RowPlace:
    """The matrix of a router that has one row for each slot."""

    module_name: str  # of the module that owns it, a path inside of the router; "" for the router itself
    weight: str
    bias: str | None

    def owner(self, router: nn.Module) -> nn.Module:
        """The module that owns it, in a router of this kind."""
        return router.get_submodule(self.module_name)


def find_rows(layer: MoeLayer, num_slots: int) -> RowPlace | None:
    """The one matrix of a router with a row for each of `num_slots` slots; None if there is none, or several."""
    total = num_slots + layer.num_passive_rows
    found = [
        (path, name)
        for path, module in layer.router.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if p.dim() == 2 and p.shape[0] == total
    ]
    if len(found) != 1:
        return None
    path, name = found[0]
    bias = getattr(layer.router.get_submodule(path), "bias", None)
    has_bias = isinstance(bias, Tensor) and tuple(bias.shape) == (total,)
    return RowPlace(path, name, "bias" if has_bias else None)


def read_rows(layer: MoeLayer, place: RowPlace, num_slots: int) -> Tensor:
    """The rows of all slots, a bias as their last entry: (N, D_r) float64, on the device where the router computes."""
    owner = place.owner(layer.router)
    with fetched(owner):
        weight = getattr(owner, place.weight).detach()
        rows = weight[:num_slots].to(sum_dtype(weight.device))
        if place.bias is None:
            return rows
        return torch.cat([rows, getattr(owner, place.bias).detach()[:num_slots, None].to(rows)], dim=1)


def write_rows(layer: MoeLayer, place: RowPlace, rows: Tensor) -> None:
    """Put rows (M, D_r) into a router that has M; rounded to its dtype. Rows of no routed expert stay."""
    owner, values = place.owner(layer.router), {place.weight: rows}
    if place.bias is not None:
        values = {place.weight: rows[:, :-1], place.bias: rows[:, -1]}
    for name, value in values.items():
        with fetched(owner):
            old = getattr(owner, name).detach()
            new = torch.cat([value.to(old), old[len(value) :]])
        replace_tensor(owner, name, new)


@torch.no_grad()
def router_inputs(layer: MoeLayer, place: RowPlace, inputs: LayerInputs) -> list[Tensor]:
    """What the rows are multiplied with for the kept tokens, (t, D_r) float32 a batch, 1 last where there is a bias.

    The router is run again. Memory: 4 D_r bytes for each token.
    """
    found: list[Tensor] = []
    owner = place.owner(layer.router)

    def keep(module: nn.Module, args: tuple) -> None:  # noqa: ARG001
        hidden_states = args[0].detach().flatten(0, -2).float()
        ones = hidden_states.new_ones(len(hidden_states), 0 if place.bias is None else 1)
        found.append(torch.cat([hidden_states, ones], dim=1))

    handle = owner.register_forward_pre_hook(keep)
    try:
        for position in range(len(inputs.router_calls)):
            layer.family.route(layer, *inputs.router_call(position, layer.block))
    finally:
        handle.remove()
    return [rows.to(execution_device(owner)) for rows in found]


def check_router(layer: MoeLayer, rule: str) -> None:
    """Refuse a router whose rows a rule is not defined for.

    A copy of the router with random numbers is asked for the weights of a few random tokens: what it does decides, not
    what it is called.

    Raises:
        ValueError: With the reason.
    """
    reason = _reason_against(layer, ROUTER_ROWS.trait(rule, "softmax", False))
    if reason:
        raise ValueError(
            f"router is {rule!r}, but for the router of {layer.name!r} it is not defined: {reason}. "
            "Leave router out, to keep the rows of the dominant experts."
        )


def _reason_against(layer: MoeLayer, needs_softmax: bool) -> str:
    place = find_rows(layer, layer.num_slots)
    if place is None:
        return f"there is not one matrix with {layer.num_slots} rows"
    if layer.family.expert_tables(layer):
        return "it looks experts up for some tokens"
    probe = probe_router(layer, place)
    if probe is None:
        return "it is not called with hidden states alone"
    if not probe.is_linear:
        return "its logits are not the products of its rows with what it is given"
    if not needs_softmax:
        return ""
    others = slot_tensors(layer, place)
    if layer.num_router_groups > 1:
        return "it chooses among groups of experts by their best scores, not by a sum of probabilities"
    if others:
        return f"{', '.join(others)} changes scores beside the rows"
    if layer.num_passive_rows:
        return "rows of no routed expert take part in its softmax"
    return "" if probe.is_softmax else "its weights are no softmax of the logits"


def slot_tensors(layer: MoeLayer, place: RowPlace) -> list[str]:
    """Other floating tensors of router and block with an entry for each slot: correction biases, scales, ..."""
    rows = {place.weight, place.bias}
    owner, found = place.owner(layer.router), []
    for module in [*layer.router.modules(), layer.block]:
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            is_other = module is not owner or name not in rows
            if is_other and tensor.is_floating_point() and slot_axis(tensor, layer.num_slots) is not None:
                found.append(name)
    return found


@dataclass(frozen=True)
class RouterProbe:
    """What a router does, seen from outside."""

    is_linear: bool  # logits are rows times inputs
    is_softmax: bool  # weights of a token are to each other as the exponentials of their logits


@torch.no_grad()
def probe_router(layer: MoeLayer, place: RowPlace) -> RouterProbe | None:
    """Ask a random copy of a router about random tokens; None where it cannot be asked so."""
    generator = torch.Generator().manual_seed(0)
    # Only shapes are copied: the model's own weights may be on the meta device, or offloaded.
    router = meta_copy(layer.router).to_empty(device="cpu").float().eval()
    for tensor in [*router.parameters(), *router.buffers()]:
        if tensor.is_floating_point():
            # Logits of a deviation of 2, whatever the size: a saturated softmax would look like other functions.
            deviation = 2 * tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else 0.5
            tensor.normal_(0.0, deviation, generator=generator)
        else:
            tensor.zero_()
    copied = dataclasses.replace(layer, router=router)
    owner = place.owner(router)
    given, said = [], []
    handles = [
        owner.register_forward_pre_hook(lambda module, args: given.append(args[0])),  # noqa: ARG005
        layer.family.logits_module(copied).register_forward_hook(
            lambda module, args, output: said.append(layer.family.logits(output))  # noqa: ARG005
        ),
    ]
    hidden_states = torch.randn(1, PROBE_TOKENS, layer.hidden_size, generator=generator)
    answer = None
    for call in (hidden_states[0], hidden_states):
        try:
            answer = layer.family.route(copied, (call,), {})
            break
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):
            given.clear(), said.clear()
    for handle in handles:
        handle.remove()
    if answer is None or not given or not said:
        return None
    inputs, logits = given[-1].flatten(0, -2), said[-1].flatten(0, -2)[:, : layer.num_slots]
    bias = getattr(owner, place.bias)[: layer.num_slots] if place.bias is not None else 0.0
    expected = inputs @ getattr(owner, place.weight)[: layer.num_slots].T + bias
    is_linear = expected.shape == logits.shape and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)
    return RouterProbe(is_linear, is_linear and _is_softmax(logits, *answer))


def _is_softmax(logits: Tensor, index: Tensor, weights: Tensor) -> bool:
    """Whether weights are proportional to exp(logits) over a token's choices; of one choice, whether it is softmax."""
    index, weights = index.reshape(len(logits), -1), weights.reshape(len(logits), -1)
    if index.shape[1] == 1:
        return torch.allclose(weights, logits.softmax(1).gather(1, index), rtol=1e-3, atol=1e-5)
    expected = logits.gather(1, index).softmax(1)
    return torch.allclose(weights / weights.sum(1, keepdim=True), expected, rtol=1e-3, atol=1e-5)
