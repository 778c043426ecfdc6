"""Packed experts and routed tokens on bare tensors, and what they compute, token by token in float64."""

import torch
from torch.nn.functional import relu, silu

from hf_mcsmoe.expert_values import PackedExperts
from hf_mcsmoe.observation.token_batches import RoutedTokens

HIDDEN = 6
FORMATS = {
    "gated": ("gate", "up", "down"),
    "ungated": ("up", "down"),
    "gated-bias": ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"),
    "ungated-bias": ("up", "down", "up_bias", "down_bias"),
}


def packed_experts(names=FORMATS["gated"], widths=(4, 0, 3, 5), hidden=HIDDEN, seed=0, dtype=torch.float32):
    """Random experts of some widths."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *widths]).cumsum(0)
    neurons = int(offsets[-1])
    shapes = {name: (neurons, hidden) for name in ("gate", "up", "down")}
    shapes |= {"gate_bias": (neurons,), "up_bias": (neurons,), "down_bias": (len(widths), hidden)}
    return PackedExperts(
        offsets=offsets, **{name: torch.randn(shapes[name], generator=generator).to(dtype) for name in names}
    )


def activation(up, gate):
    """SwiGLU, or ReLU without a gate."""
    return relu(up) if gate is None else silu(gate) * up


def random_gates(num_tokens, num_experts, top_k, seed=0):
    """(T, M) float32: positive for `top_k` experts of each token, 0 elsewhere; a later expert is chosen less often."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_experts, generator=generator) - 0.3 * torch.arange(num_experts)
    weights, index = scores.topk(top_k, dim=-1)
    return torch.zeros(num_tokens, num_experts).scatter(1, index, weights.softmax(-1))


def routed(num_tokens, num_experts, top_k=2, hidden=HIDDEN, seed=0, dtype=torch.float32):
    """Random tokens, gates and targets."""
    generator = torch.Generator().manual_seed(seed + 100)
    states, targets = torch.randn(2, num_tokens, hidden, generator=generator)
    return RoutedTokens(states.to(dtype), random_gates(num_tokens, num_experts, top_k, seed), targets.to(dtype))


def with_targets_of(experts, batch, noise=0.0):
    """The tokens of a batch with what experts give for them as targets, and noise."""
    generator = torch.Generator().manual_seed(9)
    target = slow_outputs(experts, batch)
    target += noise * torch.randn(target.shape, generator=generator)
    return RoutedTokens(batch.hidden_states, batch.gates, target.float())


def slow_features(experts, batch):
    """phi (T, P) float64: gate weight times activation, neuron by neuron."""
    expert_of_neuron = experts.expert_of_neuron.tolist()
    phi = torch.zeros(len(batch.gates), experts.num_neurons, dtype=torch.float64)
    for token, x in enumerate(batch.hidden_states.double()):
        for neuron, expert in enumerate(expert_of_neuron):
            up = experts.up[neuron].double() @ x
            up = up if experts.up_bias is None else up + experts.up_bias[neuron].double()
            gate = None if experts.gate is None else experts.gate[neuron].double() @ x
            gate = gate if experts.gate_bias is None else gate + experts.gate_bias[neuron].double()
            phi[token, neuron] = batch.gates[token, expert].double() * activation(up, gate)
    return phi


def slow_constants(experts, batch):
    """What the biases after `down` add, (T, D) float64."""
    if experts.down_bias is None:
        return torch.zeros(len(batch.gates), experts.up.shape[1], dtype=torch.float64)
    return torch.stack([(g[:, None].double() * experts.down_bias.double()).sum(0) for g in batch.gates])


def slow_outputs(experts, batch):
    """Sum over experts of gate times output, (T, D) float64."""
    return slow_features(experts, batch) @ experts.down.double() + slow_constants(experts, batch)
