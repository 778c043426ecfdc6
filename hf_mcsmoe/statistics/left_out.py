"""What a layer loses when experts are left out while the weights of the others stay."""

import torch
from torch import Tensor

from ..observed import ChosenOutputs, ExpertTokens
from . import STATISTICS


@STATISTICS.register("left_out_energy", of="expert")
def left_out_energy(routed: ExpertTokens) -> Tensor:
    """Sum over the routed tokens of |g_t f_i(x_t)|^2, g as the model applies it, (N,). Memory: 8 N bytes.

    Without expert i the output of the layer changes by g f_i, if the weights of the token's other experts are not
    renormalised: that is the mapped layout.
    """
    return (routed.gates[:, None] * routed.outputs).square().sum()


@STATISTICS.register("chosen_gram", of="choices")
def chosen_gram(chosen: ChosenOutputs) -> Tensor:
    """Sum over tokens of g_i g_j <f_i, f_j> for all pairs of experts that the router chose, (N, N).

    Without a set S of experts the output changes by the sum of g_i f_i over S, so the squared error of leaving out any
    set is the sum of the entries of S x S. Gates as for `left_out_energy`, which is the diagonal. Memory: 8 N^2 bytes;
    time T k^2 D beside the experts' own.
    """
    gated = chosen.outputs * chosen.gates[..., None]
    size, index = chosen.num_slots, chosen.index.clamp(max=chosen.num_slots - 1)
    places = index[:, :, None] * size + index[:, None, :]
    gram = gated.new_zeros(size * size)
    return gram.index_add_(0, places.flatten(), torch.bmm(gated, gated.transpose(1, 2)).flatten()).view(size, size)
