"""The output of a layer as a linear map of its gated neurons, and the sums that fit and judge such a map.

T tokens, M experts, P neurons of all experts, D hidden size. The routed experts of a layer compute

    y_t = sum over neurons a of  phi_t[a] down[a],     phi_t[a] = g_t[expert of a] * activation_a(x_t)

where g are the weights that the block applies: 0 where the router did not choose the expert. So for fixed inner
matrices the best `down` is a least-squares problem, jointly for all experts, and removing a neuron is removing a
column of the features phi.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..expert_values import PackedExperts
from .beside_experts import BesideExperts, joint_offsets
from .observed import sum_dtype
from .token_batches import RoutedTokens, in_chunks

Activation = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class FeatureSums:
    """Sums over tokens: all that a least-squares fit of `down` needs. float64.

    Memory: 8 P^2 + 8 P D bytes.
    """

    gram: Tensor  # (P, P): sum of phi phi^T
    cross: Tensor  # (P, D): sum of phi y^T
    energy: float  # sum of |y|^2
    num_tokens: int

    def of_neurons(self, kept: Tensor) -> "FeatureSums":
        """The same for some of the neurons, (P',) int64."""
        gram = self.gram.index_select(0, kept).index_select(1, kept)
        return FeatureSums(gram, self.cross.index_select(0, kept), self.energy, self.num_tokens)

    def error(self, down: Tensor, kept: Tensor | None = None) -> float:
        """Sum over the tokens of |y - phi[kept] down|^2.

        Args:
            down: (P', D) float64.
            kept: Neurons that are there, (P',) int64; None for all.
        """
        gram, cross = (self.gram, self.cross) if kept is None else (self.gram[kept[:, None], kept], self.cross[kept])
        # |y - phi down|^2 = |y|^2 + (phi^T phi down - 2 phi^T y) down
        return self.energy + torch.addmm(cross, gram, down, beta=-2).mul_(down).sum().item()


def dense_gates(index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """The weight of each expert for each token, (T, M) float32, from `index` (T, k) and `weights` (T, k).

    Experts that a token has twice get the sum of both weights; index M and -1 are no expert.
    """
    gates = weights.new_zeros(index.shape[0], num_experts + 1, dtype=torch.float32)
    is_expert = (index >= 0) & (index < num_experts)
    gates.scatter_add_(1, index.masked_fill(~is_expert, num_experts), weights.float())
    return gates[:, :num_experts]


def features_of_experts(
    experts: PackedExperts, activation: Activation, hidden_states: Tensor, gates: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """For each expert (its tokens (t,) int64 ascending, their features (t, width) float32)."""
    found = []
    for expert, matrices in enumerate(inner_matrices(experts)):
        tokens = gates[:, expert].nonzero().flatten()
        inputs = hidden_states.index_select(0, tokens).float()
        found.append((tokens, neurons_of(matrices, activation, inputs) * gates[tokens, expert, None]))
    return found


def features_in_chunks(
    experts: PackedExperts, activation: Activation, batches: Iterable[RoutedTokens]
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What `features_of_experts` gives for each of `in_chunks(batches)`."""
    device = experts.up.device
    for batch in in_chunks(batches):
        yield features_of_experts(experts, activation, batch.hidden_states.to(device), batch.gates.to(device))


def inner_matrices(experts: PackedExperts) -> list[list[tuple[Tensor, Tensor | None] | None]]:
    """For each expert its rows of `up` and those of `gate`, or None, each with their biases or None; float32.

    Cut all at once: the gradient of one slice is as large as what it is cut from, and so is that of all together.
    """
    widths, found = experts.widths.tolist(), []
    for name in ("up", "gate"):
        matrix, bias = getattr(experts, name), getattr(experts, f"{name}_bias")
        biases = [None] * len(widths) if bias is None else bias.float().split(widths)
        parts = [None] * len(widths) if matrix is None else zip(matrix.float().split(widths), biases, strict=True)
        found.append(parts)
    return [list(of_expert) for of_expert in zip(*found, strict=True)]


def neurons_of(matrices: list[tuple[Tensor, Tensor | None] | None], activation: Activation, inputs: Tensor) -> Tensor:
    """What the neurons of an expert answer to inputs (t, D), (t, width) float32."""
    return activation(*(None if matrix is None else linear(inputs, *matrix) for matrix in matrices))


def output_of_biases(experts: PackedExperts, gates: Tensor) -> Tensor | None:
    """What the biases after `down` add to the output, (T, D) float32; None without such biases."""
    return None if experts.down_bias is None else gates @ experts.down_bias.float()


@torch.no_grad()
def sum_expert_grams(
    experts: PackedExperts,
    activation: Activation,
    batches: Iterable[RoutedTokens],
    features: Iterable[list[tuple[Tensor, Tensor]]] | None = None,
) -> list[Tensor]:
    """For each expert the sum of phi phi^T over its tokens, (width, width) float64: the diagonal of `sum_features`.

    Memory: 8 bytes times the sum of the squared widths. Time: T k I^2. `features` are those of `features_in_chunks`
    where they are at hand.
    """
    widths, device = experts.widths.tolist(), experts.up.device
    grams = [torch.zeros(width, width, dtype=sum_dtype(device), device=device) for width in widths]
    for found in features_in_chunks(experts, activation, batches) if features is None else features:
        for gram, (_, features) in zip(grams, found, strict=True):
            gram += (features.T @ features).to(gram.dtype)
    return grams


@torch.no_grad()
def sum_input_grams(
    experts: PackedExperts, activation: Activation, batches: Iterable[RoutedTokens]
) -> dict[str, list[Tensor]]:
    """For each matrix of each expert the sum of the outer products of what it is multiplied with.

    A token counts once for each expert that it goes to, without the gate.

    Returns:
        "up", and "gate" where there is one: (D, D) for each expert; "down": (width, width). float64. Memory:
        8 bytes times M (D^2 + I^2).
    """
    device, dtype, hidden = experts.up.device, sum_dtype(experts.up.device), experts.up.shape[1]
    inward = [torch.zeros(hidden, hidden, dtype=dtype, device=device) for _ in range(experts.num_experts)]
    outward = [torch.zeros(width, width, dtype=dtype, device=device) for width in experts.widths.tolist()]
    matrices_of_expert = inner_matrices(experts)
    for batch in in_chunks(batches):
        hidden_states, gates = batch.hidden_states.to(device), batch.gates.to(device)
        for expert, matrices in enumerate(matrices_of_expert):
            inputs = hidden_states.index_select(0, gates[:, expert].nonzero().flatten()).float()
            features = neurons_of(matrices, activation, inputs)
            inward[expert] += (inputs.T @ inputs).to(dtype)
            outward[expert] += (features.T @ features).to(dtype)
    names = ("up",) if experts.gate is None else ("gate", "up")
    return dict.fromkeys(names, inward) | {"down": outward}


@torch.no_grad()
def sum_features(
    experts: PackedExperts,
    activation: Activation,
    batches: Iterable[RoutedTokens],
    features: Iterable[list[tuple[Tensor, Tensor]]] | None = None,
    beside: BesideExperts | None = None,
) -> FeatureSums:
    """Add up the features of all tokens; only pairs of experts that share tokens are multiplied.

    Products are float32 in batches, sums float64 (float32 where the device has no float64). Time: T (k I)^2.

    Args:
        experts: Their inner matrices; `down` is not read, `down_bias` counts as fixed.
        activation: From `MoeFamily.activation`.
        batches: Of any size; about `CHUNK_TOKENS` tokens are handled at a time.
        features: Of `features_in_chunks` where they are at hand.
        beside: More blocks of features, after those of the experts.
    """
    offsets, hidden = joint_offsets(experts, beside), experts.up.shape[1]
    neurons, device, dtype = offsets[-1], experts.up.device, sum_dtype(experts.up.device)
    gram = torch.zeros(neurons, neurons, dtype=dtype, device=device)
    cross = torch.zeros(neurons, hidden, dtype=dtype, device=device)
    energy, num_tokens = torch.zeros((), dtype=dtype, device=device), 0
    batches = list(batches)
    features = features_in_chunks(experts, activation, batches) if features is None else features
    for batch, found in zip(in_chunks(batches), features, strict=True):
        num_tokens += batch.gates.shape[0]
        gates, targets = batch.gates.to(device), batch.targets.to(device).float()
        constant = output_of_biases(experts, gates)
        targets = targets if constant is None else targets - constant
        energy += targets.to(dtype).square().sum()
        found = found if beside is None else [*found, *beside.features(batch)]
        add_products(found, targets, offsets, gram, cross)
    for start, end in itertools.pairwise(offsets):
        gram[end:, start:end] = gram[start:end, end:].T
    return FeatureSums(gram, cross, energy.item(), num_tokens)


def add_products(
    found: list[tuple[Tensor, Tensor]], targets: Tensor, offsets: list[int], gram: Tensor, cross: Tensor
) -> None:
    """Add phi^T y and the blocks of phi^T phi, for pairs of experts in their order, of one chunk of tokens."""
    position = torch.full((len(found), targets.shape[0]), -1, device=targets.device)
    for expert, (tokens, _) in enumerate(found):
        position[expert, tokens] = torch.arange(tokens.numel(), device=targets.device)
    for expert, (tokens, features) in enumerate(found):
        rows = slice(offsets[expert], offsets[expert + 1])
        if not tokens.numel() or rows.start == rows.stop:
            continue
        cross[rows] += (features.T @ targets.index_select(0, tokens)).to(cross.dtype)
        gram[rows, rows] += (features.T @ features).to(gram.dtype)
        shared = position[expert + 1 :].index_select(1, tokens)
        for other, places in enumerate(shared, start=expert + 1):
            columns = slice(offsets[other], offsets[other + 1])
            both = (places >= 0).nonzero().flatten()
            if both.numel() and columns.start < columns.stop:
                mine, others = features.index_select(0, both), found[other][1].index_select(0, places[both])
                gram[rows, columns] += (mine.T @ others).to(gram.dtype)


def apply_down(experts: PackedExperts, activation: Activation, batch: RoutedTokens) -> Tensor:
    """What experts give for the tokens of a batch, (t, D) float32."""
    output = output_of_biases(experts, batch.gates)
    output = torch.zeros_like(batch.hidden_states, dtype=torch.float32) if output is None else output
    found = features_of_experts(experts, activation, batch.hidden_states, batch.gates)
    return add_outputs(experts.down, experts.offsets.tolist(), found, output)


def add_outputs(down: Tensor, offsets: list[int], found: list[tuple[Tensor, Tensor]], output: Tensor) -> Tensor:
    """`output` (t, C) float32 with what `down` (P, C) makes of the features of experts added, in place."""
    parts = down.float().split([end - start for start, end in itertools.pairwise(offsets)])
    for part, (tokens, features) in zip(parts, found, strict=True):
        output.index_add_(0, tokens, features @ part)
    return output
