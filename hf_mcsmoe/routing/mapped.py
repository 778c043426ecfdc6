"""Mapped layout: the router keeps its rows, a map sends slots to stored experts."""

from ..routing import ROUTING
from ..types import ExpertGroups, Routing


@ROUTING.register("mapped")
def route_through_a_map(groups: ExpertGroups) -> Routing:
    """Slot i goes to the group of expert i; a dropped expert's slot (-1) adds nothing.

    Li et al., 2024 (https://arxiv.org/abs/2310.01334, appendix A.3): gate mass and routing stay those of the
    original model; slots of a token that share an expert add their weights.
    """
    return Routing(slot_map=groups.group_of_expert)
