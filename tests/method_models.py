"""The two models on which every method is tested, and what a slow reference needs to know of their layers."""

import itertools
from dataclasses import dataclass

import torch
from tiny_models import tiny_model
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedModel

from hf_mcsmoe.families import find_layers
from hf_mcsmoe.types import ExpertWeights, MoeLayer

MODELS = {
    "mixtral": {"num_hidden_layers": 2},
    "qwen3_moe": {"num_hidden_layers": 2, "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True},
}
NUM_EXPERTS = {"mixtral": 8, "qwen3_moe": 16}


def method_model(name: str, **changes) -> PreTrainedModel:
    """8 experts top-2 like Mixtral, or 16 experts top-4 like Qwen3 MoE; two layers."""
    return tiny_model(name, **MODELS[name], **changes)


@dataclass(frozen=True)
class Seen:
    """What one layer of the original model was given for all calibration tokens."""

    layer: MoeLayer
    weights: ExpertWeights  # float64
    inputs: Tensor  # (T, D) float64
    logits: Tensor  # (T, N) float64
    index: Tensor  # (T, k): experts of each token
    gates: Tensor  # (T, k)

    def activations(self, expert: int) -> Tensor:
        """Of one expert on all tokens, (T, I)."""
        gate, up = self.weights.gate[expert], self.weights.up[expert]
        return torch.stack([silu(gate @ x) * (up @ x) for x in self.inputs])

    def output(self, expert: int) -> Tensor:
        """Of one expert on all tokens, (T, D)."""
        return torch.stack([self.weights.down[expert] @ a for a in self.activations(expert)])

    def counts(self) -> list[int]:
        """How often each expert was chosen."""
        return [int((self.index == expert).sum()) for expert in range(len(self.weights.up))]

    def routed_mean_norms(self) -> list[float]:
        """Mean over the tokens of each expert of |gate * output|; 0 for an expert that was never chosen."""
        means = []
        for expert in range(len(self.weights.up)):
            output, found = self.output(expert), []
            for token, slot in (self.index == expert).nonzero().tolist():
                found.append((self.gates[token, slot] * output[token]).norm().item())
            means.append(sum(found) / len(found) if found else 0.0)
        return means


@torch.no_grad()
def seen_by_layers(model: PreTrainedModel, tokens: Tensor) -> list[Seen]:
    """What each MoE layer of a model gets for token ids (B, S): by hooks of our own, nothing of the pipeline."""
    found = []
    for layer in find_layers(model):
        got = {}
        handle = layer.experts.register_forward_pre_hook(lambda _, args, got=got: got.update(args=args))
        model(tokens)
        handle.remove()
        inputs, index, gates = got["args"][:3]
        logits = inputs.double() @ layer.router.weight.double().T
        gate, up = layer.experts.gate_up_proj.detach().double().chunk(2, dim=1)
        weights = ExpertWeights(gate=gate, up=up, down=layer.experts.down_proj.detach().double())
        found.append(Seen(layer, weights, inputs.double(), logits, index, gates.double()))
    return found


def experts_now(model: PreTrainedModel) -> list[ExpertWeights]:
    """The experts that each layer stores after compression, float64."""
    result = []
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            gate, up = module.gate_up_proj.detach().double().chunk(2, dim=1)
            result.append(ExpertWeights(gate=gate, up=up, down=module.down_proj.detach().double()))
    return result


OF_PAIRS = {"average": lambda found: sum(found) / len(found), "complete": max, "single": min}


def slow_clusters(distance: Tensor, num_clusters: int, linkage: str = "average") -> list[list[int]]:
    """Join the closest two clusters, measured afresh over all pairs of members, until enough are left."""
    clusters = [[item] for item in range(len(distance))]
    apart = distance.tolist()
    while len(clusters) > num_clusters:
        between = {
            (a, b): OF_PAIRS[linkage]([apart[i][j] for i in clusters[a] for j in clusters[b]])
            for a, b in itertools.combinations(range(len(clusters)), 2)
        }
        a, b = min(between, key=between.get)
        clusters[a] = sorted(clusters[a] + clusters.pop(b))
    return sorted(clusters)


def slow_m_smoe_groups(seen: Seen, similarity: Tensor, num_groups: int) -> list[list[int]]:
    """Groups of M-SMoE, the most used experts first in each: every other one joins the most similar of these."""
    count = seen.counts()
    ranked = sorted(range(len(count)), key=lambda e: (-count[e], e))
    leaders = sorted(ranked[:num_groups])
    groups = {leader: [leader] for leader in leaders}
    for expert in sorted(ranked[num_groups:]):
        groups[max(leaders, key=lambda leader: (similarity[expert, leader].item(), -leader))].append(expert)
    return [groups[leader] for leader in leaders]


def cosines(vectors: Tensor) -> Tensor:
    """Of each pair of rows."""
    return torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in vectors]) for a in vectors])


def assert_experts_close(found: ExpertWeights, expected: ExpertWeights, **tolerance) -> None:
    """All matrices are the same within rounding."""
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[name], tensor, **{"rtol": 1e-4, "atol": 1e-6, **tolerance})
