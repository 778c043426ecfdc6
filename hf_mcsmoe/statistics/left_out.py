"""What a layer loses when experts are left out while the weights of the others stay."""

import torch
from torch import Tensor

from ..observation.observed import ChosenOutputs
from ..statistics import STATISTICS


@STATISTICS.register("chosen_gram", of="choices")
def chosen_gram(chosen: ChosenOutputs) -> Tensor:
    """Sum over tokens of g_i g_j <f_i, f_j> for all pairs of experts that the router chose, (N, N).

    g is the gate as the model applies it. Without a set S of experts the output changes by the sum of g_i f_i over S,
    if the weights of a token's other experts are not renormalised: that is the mapped layout. So the squared error of
    leaving out any set is the sum of the entries of S x S, and of one expert its entry of the diagonal. Memory: 8 N^2
    bytes; time T k^2 D beside the experts' own.
    """
    gated = chosen.outputs * chosen.gates[..., None]
    size, index = chosen.num_slots, chosen.index.clamp(max=chosen.num_slots - 1)
    places = index[:, :, None] * size + index[:, None, :]
    gram = gated.new_zeros(size * size)
    return gram.index_add_(0, places.flatten(), torch.bmm(gated, gated.transpose(1, 2)).flatten()).view(size, size)
