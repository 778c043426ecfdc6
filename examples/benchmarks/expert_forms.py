"""Time of a forward through decomposed experts against dense ones, and through ragged experts against uniform ones.

    python examples/benchmarks/expert_forms.py

One mapped Qwen3-MoE layer of experts. Decomposed: rank and share of kept rows as given, every expert with another
number of rows. Ragged: widths from an eighth to seven eighths of the dense width against half of it for all, with the
same number of tokens for each expert, so FLOPs are equal. The two take turns, and medians of the rounds are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from hf_mcsmoe.expert_values import LowRankSparse, PackedExperts
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling.experts import install_mapped
from hf_mcsmoe.modeling.install_forms import install_low_rank_sparse, install_ragged
from hf_mcsmoe.types import ExpertWeights, MoeLayer

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_layer(args: argparse.Namespace) -> MoeLayer:
    """A layer of dense random experts."""
    config = Qwen3MoeConfig(
        hidden_size=args.hidden,
        moe_intermediate_size=args.width,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        num_hidden_layers=1,
        vocab_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = Qwen3MoeForCausalLM._from_config(config, dtype=DTYPES[args.dtype]).eval()
    return find_layers(model)[0]


def decomposed(layer: MoeLayer, args: argparse.Namespace) -> None:
    """Give the layer random factors."""
    factors = {}
    for matrix, (outputs, inputs) in {
        "gate": (args.width, args.hidden),
        "up": (args.width, args.hidden),
        "down": (args.hidden, args.width),
    }.items():
        factors[matrix] = []
        for expert in range(args.experts):
            share = args.rows * 2 * (expert + 0.5) / args.experts
            rows = torch.randperm(outputs)[: round(share * outputs)].sort().values
            left, right = torch.randn(outputs, args.rank) * 0.1, torch.randn(args.rank, inputs) * 0.1
            factors[matrix].append(LowRankSparse(left, right, rows, torch.randn(len(rows), inputs) * 0.02))
    install_low_rank_sparse(layer, factors, {}, torch.arange(args.experts), layout(args))


def uniform(layer: MoeLayer, args: argparse.Namespace) -> None:
    """Cut all experts to half of their width."""
    width = args.width // 2
    weights = layer.family.view(layer, layer.expert_parameters)
    cut = ExpertWeights(gate=weights.gate[:, :width], up=weights.up[:, :width], down=weights.down[:, :, :width])
    install_mapped(layer, layer.family.unview(layer, cut), torch.arange(args.experts), layout(args))


def ragged(layer: MoeLayer, args: argparse.Namespace) -> None:
    """Cut experts to widths around half of the width, from an eighth to seven eighths."""
    packed = PackedExperts.from_dense(layer.family.view(layer, layer.expert_parameters))
    shares = torch.linspace(1 / 8, 7 / 8, args.experts)
    place = torch.arange(packed.num_neurons) % args.width
    kept = place < (shares * args.width).round()[packed.expert_of_neuron]
    install_ragged(layer, packed.select_neurons(kept.nonzero().flatten()), torch.arange(args.experts), layout(args))


def layout(args: argparse.Namespace) -> dict:
    """The layer's entry for as many experts as before."""
    return {
        "num_experts": args.experts,
        "num_slots": args.experts,
        "has_dropped": False,
        "collapse_duplicates": False,
    }


def variant(change: Callable | None, args: argparse.Namespace) -> nn.Module:
    """The experts module after `change`."""
    torch.manual_seed(0)
    layer = random_layer(args)
    if change is not None:
        change(layer, args)
    return layer.experts


@torch.no_grad()
def ratio(
    experts: nn.Module, reference: nn.Module, implementation: str, args: argparse.Namespace
) -> tuple[float, float, float]:
    """(median time of `experts` / `reference`, median milliseconds of each)."""
    hidden = torch.randn(args.tokens, args.hidden, dtype=DTYPES[args.dtype])
    weights, index = balanced_routing(args)
    tokens = args.decode_tokens if implementation == "batched_mm" else args.tokens
    call = (hidden[:tokens], index[:tokens], weights[:tokens].to(hidden.dtype))
    seconds: list[tuple[float, float]] = []
    for _ in range(args.repeats + 2):  # the first rounds warm up
        seconds.append((timed(experts, implementation, call), timed(reference, implementation, call)))
    medians = [statistics.median(column) for column in zip(*seconds[2:], strict=True)]
    return statistics.median(a / b for a, b in seconds[2:]), 1e3 * medians[0], 1e3 * medians[1]


def timed(experts: nn.Module, implementation: str, call: tuple[Tensor, ...]) -> float:
    """Seconds of one forward."""
    experts.config._experts_implementation = implementation
    start = time.perf_counter()
    experts(*call)
    return time.perf_counter() - start


def balanced_routing(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Weights (T, k) and experts (T, k) with which every expert gets the same number of tokens."""
    start = torch.arange(args.tokens)[:, None] * args.top_k
    index = (start + torch.arange(args.top_k)) % args.experts
    return torch.rand(args.tokens, args.top_k).softmax(-1), index[torch.randperm(args.tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rows", type=float, default=0.1, help="share of the rows that are kept")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--decode-tokens", type=int, default=4, help="for the batched implementation")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    pairs = {"decomposed / dense": (decomposed, None), "ragged / uniform": (ragged, uniform)}
    print("| | implementation | tokens | ms | ms of the other | ratio |")
    print("|---|---|---:|---:|---:|---:|")
    for title, (change, reference) in pairs.items():
        both = variant(change, args), variant(reference, args)
        for implementation in IMPLEMENTATIONS:
            tokens = args.decode_tokens if implementation == "batched_mm" else args.tokens
            found = ratio(*both, implementation, args)
            print(f"| {title} | {implementation} | {tokens} | {found[1]:.1f} | {found[2]:.1f} | {found[0]:.2f} |")


if __name__ == "__main__":
    main()
