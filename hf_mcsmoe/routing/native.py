"""Native layout: the router keeps the rows of the dominant experts."""

from ..routing import ROUTING
from ..types import ExpertGroups, Routing


@ROUTING.register("native")
def route_by_dominant_rows(groups: ExpertGroups) -> Routing:
    """Keep the router row (and bias, correction bias, scale) of each group's dominant expert.

    The result is a plain model of the original architecture with M experts. Its router picks k of M, so
    experts formerly ranked below k are used, and gates that are normalised over the top k change.
    """
    return Routing(rows=groups.dominant_of_group)
