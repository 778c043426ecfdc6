"""What all experts make of the same tokens, wherever the router sent these."""

import torch
from torch import Tensor

from ..observation.observed import EveryExpert, sum_dtype
from ..statistics import STATISTICS


@STATISTICS.register("every_expert_count", of="every_expert")
def every_expert_count(seen: EveryExpert) -> Tensor:
    """Tokens that all experts were run on, () float64. Memory: 8 bytes."""
    return torch.tensor(float(len(seen.gates)), device=seen.gates.device)


@STATISTICS.register("every_output_sum", of="every_expert")
def every_output_sum(seen: EveryExpert) -> Tensor:
    """Sum over tokens of f_i(x_t), without a gate, (N, D). Memory: 8 N D bytes."""
    return seen.outputs.sum(dim=1, dtype=sum_dtype(seen.outputs.device))


@STATISTICS.register("soft_gated_output_sum", of="every_expert", logits=True)
def soft_gated_output_sum(seen: EveryExpert) -> Tensor:
    """Sum over tokens of p_ti f_i(x_t), p the softmax over all N router logits, (N, D). Memory: 8 N D bytes.

    Not the gate that the model applies, which is 0 for most experts of a token: every expert has a p.
    """
    gated = seen.outputs * seen.logits.float().softmax(dim=-1).T[:, :, None]
    return gated.sum(dim=1, dtype=sum_dtype(gated.device))


@STATISTICS.register("output_cosine_sum", of="every_expert")
def output_cosine_sum(seen: EveryExpert) -> Tensor:
    """Sum over tokens of cos(f_i(x_t), f_j(x_t)), (N, N); an output of zeros has the cosine 0. Memory: 8 N^2 bytes."""
    norms = seen.outputs.norm(dim=-1, keepdim=True)
    units = torch.where(norms > 0, seen.outputs / torch.where(norms > 0, norms, 1.0), 0.0)
    return torch.einsum("itd,jtd->ij", units, units)
