"""Finding routers and sizes by what modules are, with the names that transformers uses for them."""

import re
from typing import Any

from torch import nn

TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "num_selected_experts",
)
GROUP_NAMES = ("n_group", "num_group", "num_expert_group")
TOP_GROUP_NAMES = ("topk_group", "top_k_group")
NUM_EXPERTS_NAMES = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
# Rows of a router with those that belong to no routed expert, and what an experts module accepts as index.
NUM_ROWS_NAMES = ("n_routed_experts", "total_experts", "n_total_experts", "num_router_classes")

MOST_EXTRA_ROWS = 8  # a router may have up to twice as many rows as experts, and a few more


def read_attribute(names: tuple[str, ...], *owners: Any) -> int | None:
    """The first positive whole number that one of `owners` has under one of `names`."""
    for owner in owners:
        for name in names:
            try:
                value = getattr(owner, name, None)
            except RuntimeError:
                continue  # configurations with per-layer values raise for attributes that differ between layers
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def count_passive_rows(router: nn.Module, num_slots: int, num_identity: int) -> int:
    """Rows of a router after those of its experts: identity experts, a slot that skips, shared experts; mostly 0."""
    rows = sorted({p.shape[0] for p in router.parameters() if p.dim() == 2 and p.shape[0] >= num_slots})
    if num_identity and num_slots + num_identity in rows:
        return num_identity
    return rows[0] - num_slots if rows and rows[0] <= 2 * num_slots + MOST_EXTRA_ROWS else 0


def router_score(name: str, module: nn.Module, num_experts: int) -> int:
    """How much a sibling of the experts looks like their router; 3 or more is one."""
    rows = [p.shape[0] for p in module.parameters() if p.dim() == 2]
    score = 0
    if re.search(r"router|gate$|classifier|wg", name):
        score += 2
    if num_experts in rows:
        score += 2
    elif any(num_experts < r <= 2 * num_experts + MOST_EXTRA_ROWS for r in rows):
        score += 1 if re.search(r"router|gate$|classifier", name) else 0
    if re.search(r"Router|TopK|Gat(e|ing)$", type(module).__name__):
        score += 2
    return score


def find_router(experts_name: str, modules: dict[str, nn.Module], num_experts: int) -> tuple[str, str] | None:
    """(router path, path of the module that holds both), looked for beside the experts and one level up."""
    parent = experts_name.rpartition(".")[0]
    for _ in range(2):
        candidates = []
        for child_name, child in modules[parent].named_children():
            path = f"{parent}.{child_name}" if parent else child_name
            holds_experts = experts_name == path or experts_name.startswith(path + ".")
            if holds_experts or "shared" in child_name or child_name == "experts":
                continue
            score = router_score(child_name, child, num_experts)
            if score >= 3:
                candidates.append((-score, path))
        if candidates:
            return min(candidates)[1], parent
        if not parent:
            return None
        parent = parent.rpartition(".")[0]
    return None
