"""What the experts of Mixtral and Qwen3 MoE do, token by token and from their matrices alone: for slow references."""

from dataclasses import dataclass, field

import pytest
import torch

from hf_mcsmoe import load_calibration
from hf_mcsmoe.families import find_layers

MODELS = {
    "mixtral": {},  # 8 experts, top-2
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True},
}
# For parametrize: the larger one only in the slow runs.
STUDIED = ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)]


@dataclass
class SlowToken:
    """One real token at one MoE layer; float64."""

    hidden: torch.Tensor  # (D,), what the experts are given
    residual: torch.Tensor  # (D,), what their output is added to
    logits: torch.Tensor  # (N,)
    gates: dict[int, float]  # by expert
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)  # of experts that were asked for


@dataclass
class SlowLayer:
    """The experts of one layer and the tokens that they were given."""

    gate_up: torch.Tensor  # (N, 2 I, D)
    down: torch.Tensor  # (N, D, I)
    tokens: list[SlowToken] = field(default_factory=list)

    @property
    def num_experts(self) -> int:
        return len(self.down)

    def activation(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the last matrix of an expert is multiplied with, (I,)."""
        gate, up = (self.gate_up[expert] @ hidden).chunk(2)
        return gate / (1 + (-gate).exp()) * up

    def output(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """What an expert gives before its gate, (D,)."""
        return self.down[expert] @ self.activation(expert, hidden)

    def output_for(self, expert: int, token: SlowToken) -> torch.Tensor:
        """The same for a token, computed once."""
        if expert not in token.outputs:
            token.outputs[expert] = self.output(expert, token.hidden)
        return token.outputs[expert]

    def routed_to(self, expert: int) -> list[tuple[float, SlowToken]]:
        """(gate, token) of the tokens that go to an expert."""
        return [(token.gates[expert], token) for token in self.tokens if expert in token.gates]


def ragged_rows(tokens: torch.Tensor) -> list[list[int]]:
    """The calibration tokens as rows of 5 to 20."""
    return [row[: 5 + place % 16].tolist() for place, row in enumerate(tokens)]


def padded(rows: list[list[int]], batch_size: int = 7):
    """Rows in padded batches, none of them held out."""
    return load_calibration(rows, batch_size=batch_size, held_out_fraction=0)


@torch.no_grad()
def slow_layers(model, rows: list[list[int]]) -> list[SlowLayer]:
    """All MoE layers of a model of `MODELS`, with every token of the rows, which run one by one and unpadded."""
    found = find_layers(model)
    slow = [SlowLayer(x.experts.gate_up_proj.double(), x.experts.down_proj.double()) for x in found]
    handles = []
    for place, layer in enumerate(found):
        seen = {}
        decoder = model.get_submodule(layer.block_name.rpartition(".")[0])

        def on_norm(module, args, seen=seen):  # noqa: ARG001
            seen["residual"] = args[0].flatten(0, 1).double()

        def on_experts(module, args, kwargs, seen=seen, place=place, layer=layer):  # noqa: ARG001
            hidden, index, weights = (*args, *kwargs.values())[:3]
            logits = hidden.double() @ layer.router.weight.double().T
            for t in range(len(hidden)):
                gates = dict(zip(index[t].tolist(), weights[t].double().tolist(), strict=True))
                slow[place].tokens.append(SlowToken(hidden[t].double(), seen["residual"][t], logits[t], gates))

        handles.append(decoder.post_attention_layernorm.register_forward_pre_hook(on_norm))
        handles.append(layer.experts.register_forward_pre_hook(on_experts, with_kwargs=True))
    for row in rows:
        model(input_ids=torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return slow


def kept_by(score: list[float], num_experts: int) -> list[int]:
    """The experts of the largest scores, ascending; ties go to the lower one."""
    return sorted(sorted(range(len(score)), key=lambda expert: (-score[expert], expert))[:num_experts])
