"""What selection takes for the features of experts that no calibration token reached."""

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..observation.gated_features import Activation, sum_expert_grams
from ..observation.token_batches import CHUNK_TOKENS, RoutedTokens


@torch.no_grad()
def with_unreached(
    grams: list[Tensor], experts: PackedExperts, activation: Activation, tokens: list[RoutedTokens]
) -> list[Tensor]:
    """Grams in which an expert that gave no answer to any token counts as if one average token had reached it.

    What calibration never showed may still come: after T tokens without it, the rule of succession (Laplace) expects
    an event once in about T. The average token is the mean over the layer's own tokens, the gate the root mean square
    of those that were applied. So neurons of such an expert have a rank among each other and beside rarely used
    neurons of the others, where an empty Gram would let all of them go first. This is ours, not from a paper.

    Args:
        grams: From `sum_expert_grams` for these experts and tokens; not changed.
        experts: M experts.
        activation: From `MoeFamily.activation`.
        tokens: The first `CHUNK_TOKENS` of them, or a batch more, stand for all. Without tokens, or where no gate
            was applied, nothing is known and the Grams stay as they are.

    Returns:
        For each expert (width, width).
    """
    unreached = [expert for expert, gram in enumerate(grams) if len(gram) and not gram.any()]
    num_applied = sum(batch.gates.count_nonzero().item() for batch in tokens)
    if not unreached or num_applied == 0:
        return grams
    gate = (sum(batch.gates.double().square().sum().item() for batch in tokens) / num_applied) ** 0.5
    sample, num_tokens = [], 0
    for batch in tokens:
        if num_tokens < CHUNK_TOKENS:
            gates = torch.zeros_like(batch.gates)
            gates[:, unreached] = gate
            sample.append(RoutedTokens(batch.hidden_states, gates, batch.targets))
            num_tokens += gates.shape[0]
    averages = sum_expert_grams(experts, activation, sample)
    return [averages[e] / num_tokens if e in unreached else gram for e, gram in enumerate(grams)]
