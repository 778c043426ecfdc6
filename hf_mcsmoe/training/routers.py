"""The routers of a model: to freeze them, and to read their logits during a forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..families import find_layers
from ..families.names import find_router


@dataclass(frozen=True, eq=False)
class Router:
    """The router of one MoE layer."""

    layer: str  # path of the experts module, as in the model that was compressed where that is known
    module: nn.Module
    num_slots: int  # N
    scores: nn.Module  # the module whose output holds the logits
    read: Callable[[Any], Tensor]  # the logits (..., N) in an output of `scores`


def find_routers(model: nn.Module) -> list[Router]:
    """The routers of all MoE layers, in the order of the model's modules; empty for a dense model.

    Layers whose experts no family knows any more (decomposed ones) are found by the names in the configuration of
    the mapped layout, and their router by its name and shape beside them.

    Args:
        model: Original, compressed, or wrapped by PEFT.
    """
    modules = dict(model.named_modules())
    routers = {
        x.name: Router(x.name, x.router, x.num_slots, x.family.logits_module(x), x.family.logits)
        for x in find_layers(model)
    }
    layout = getattr(getattr(model, "config", None), "merged_sparse_moe", None) or {}
    for name, entry in layout.get("layers", {}).items():
        if any(same_layer(name, known) for known in routers):
            continue
        path = next((path for path in modules if same_layer(name, path)), None)
        found = find_router(path, modules, entry["num_slots"]) if path is not None else None
        if found is not None:
            router, num_slots = modules[found[0]], entry["num_slots"]
            routers[path] = Router(path, router, num_slots, _scores_of(router, num_slots), _first)
    order = {name: place for place, name in enumerate(modules)}
    return sorted(routers.values(), key=lambda router: order[router.layer])


def same_layer(name: str, other: str) -> bool:
    """Whether two paths mean one layer: wrappers and heads put a prefix before it or take one away."""
    longer, shorter = (name, other) if len(name) >= len(other) else (other, name)
    return longer == shorter or longer.endswith(f".{shorter}")


def _scores_of(router: nn.Module, num_slots: int) -> nn.Module:
    linear = (m for m in router.modules() if isinstance(m, nn.Linear) and m.out_features == num_slots)
    return next(linear, router)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def freeze_routers(model: nn.Module) -> int:
    """Take the parameters of all routers out of training; the number of routers."""
    routers = find_routers(model)
    for router in routers:
        router.module.requires_grad_(False)
    return len(routers)


def train_only_routers(model: nn.Module) -> int:
    """Take all parameters out of training, except for those of the routers; the number of routers.

    Raises:
        ValueError: There is no router.
    """
    routers = find_routers(model)
    if not routers:
        raise ValueError(f"only_routers is set, but {type(model).__name__} has no router. Leave it out.")
    model.requires_grad_(False)
    for router in routers:
        router.module.requires_grad_(True)
    return len(routers)


def paired_routers(student: nn.Module, teacher: nn.Module) -> list[tuple[Router, Router]]:
    """The routers of both models, layer by layer.

    Raises:
        ValueError: A router of the student has no counterpart with the same number of slots, or there is none at all.
    """
    of_teacher = find_routers(teacher)
    pairs = []
    for router in find_routers(student):
        match = next((one for one in of_teacher if same_layer(one.layer, router.layer)), None)
        if match is None or match.num_slots != router.num_slots:
            slots = "no such layer" if match is None else f"{match.num_slots}"
            raise ValueError(
                f"router_weight needs the same slots in both models, but {router.layer!r} has {router.num_slots} in "
                f"the student and {slots} in the teacher. Set router_weight=0, or compress to the mapped layout."
            )
        pairs.append((router, match))
    if not pairs:
        raise ValueError(f"router_weight is set, but {type(student).__name__} has no router. Set router_weight=0.")
    return pairs


@contextmanager
def recorded_logits(routers: Sequence[Router]) -> Iterator[list[Tensor]]:
    """Within the context a forward pass fills the list with each router's logits, (T, N), in the order of `routers`.

    The list is complete when the context ends.
    """
    logits: dict[int, Tensor] = {}
    handles = []
    for place, router in enumerate(routers):

        def keep(module: nn.Module, args: Any, output: Any, place: int = place, router: Router = router) -> None:  # noqa: ARG001
            scores = router.read(output)
            logits[place] = scores.reshape(-1, scores.shape[-1])

        handles.append(router.scores.register_forward_hook(keep))
    recorded: list[Tensor] = []
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
        recorded.extend(logits[place] for place in sorted(logits))
