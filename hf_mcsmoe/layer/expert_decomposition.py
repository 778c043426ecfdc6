"""All experts of one layer, decomposed by one rule."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..decomposition import DECOMPOSITION
from ..expert_values import LowRankSparse
from ..types import ExpertWeights


def decompose_experts(
    weights: ExpertWeights,
    rule: str,
    options: Mapping[str, Any],
    input_grams: Mapping[str, Sequence[Tensor]] | None = None,
    ranks: Sequence[int] | None = None,
) -> tuple[dict[str, list[LowRankSparse]], dict[str, Tensor]]:
    """Factors and biases as `install_low_rank_sparse` takes them; matrices one by one.

    Args:
        weights: M experts.
        rule: A name in `DECOMPOSITION`.
        options: Its options.
        input_grams: For each matrix ("gate", "up", "down") the Grams (I, I) of what each of the M experts multiplies
            it with; None for a rule that reads none.
        ranks: Of each of the M experts, for a rule that does not choose them itself.

    Returns:
        For each matrix that the experts have: M factors in the dtype of `weights`, and its bias (M, O) if any.

    Raises:
        ValueError: What the rule does not take.
    """
    tensors = weights.tensors()
    factors = {}
    for name in [name for name in tensors if not name.endswith("_bias")]:
        grams = input_grams[name] if input_grams is not None else [None] * weights.num_experts
        chosen = [{"rank": rank} for rank in ranks] if ranks is not None else [{}] * weights.num_experts
        triples = zip(tensors[name].detach(), grams, chosen, strict=True)
        factors[name] = [DECOMPOSITION[rule](matrix, gram, **{**options, **own}) for matrix, gram, own in triples]
    return factors, {name.removesuffix("_bias"): bias for name, bias in tensors.items() if name.endswith("_bias")}
