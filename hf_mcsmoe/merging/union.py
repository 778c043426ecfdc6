"""The neurons of all members side by side; a selection chooses among them."""

import torch

from ..merging import MERGING
from ..solvers.down_fit import shares_of
from ..types import ExpertWeights


@MERGING.register("union", takes="experts", unites=True)
def merge_by_union(members: ExpertWeights, importance: torch.Tensor) -> ExpertWeights:
    """Put the members of a group beside each other, each with its share of the output.

    The result has m I neurons: gate and up are those of the members, unchanged, and the columns of `down` of member i
    are multiplied with its share s_i of the importance, so it computes sum_i s_i f_i(x) exactly, which no average of
    gate and up does. Under the gates of the mapped layout, where a token's gate of a group is the sum of those of its
    members, that is the mean of the members' outputs. The recipe's `selection` then keeps as many neurons as the
    budget allows, and its `refit` replaces the shares by what suits the layer best. Ours, without a paper; DERN
    (2025, https://arxiv.org/abs/2509.10377) moves neurons between experts too, but averages those it gathers.

    No alignment: neurons stay pairs of gate and up rows that were trained together, in whatever order.

    Memory: the members in float32.

    Args:
        members: (m, ...) float32, the dominant expert first.
        importance: (m,), >= 0. All 0 counts the dominant expert alone: the columns of the others are 0, until a refit.

    Returns:
        One expert of width m I, float32, neurons in the order of the members. A bias after `down` is the mean by
        shares, exact in the same sense.
    """
    shares = shares_of(importance, members.up.device)
    fields = {name: t.flatten(0, 1) for name, t in members.tensors().items() if name not in ("down", "down_bias")}
    fields["down"] = (shares[:, None, None] * members.down).transpose(0, 1).flatten(1)
    if members.down_bias is not None:
        fields["down_bias"] = shares @ members.down_bias
    return ExpertWeights(**{name: tensor[None] for name, tensor in fields.items()})
