"""From which share of duplicate slots computing an expert once per token is faster than computing it for every slot.

    python examples/benchmarks/collapse_duplicates.py

One mapped layer, grouped implementation; both settings take turns. The share where the ratio passes 1 is
`WORTH_COLLAPSING` in `hf_mcsmoe/layer/duplicates.py`.
"""

import argparse
import statistics
import time

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_mcsmoe.modeling.experts import ExpertMap, map_slots


def mapped_experts(args: argparse.Namespace, num_experts: int) -> MixtralExperts:
    """Random experts behind a map of `args.slots` slots."""
    config = MixtralConfig(
        hidden_size=args.hidden, intermediate_size=args.width, num_local_experts=num_experts, num_hidden_layers=1
    )
    config._experts_implementation = "grouped_mm"
    experts = MixtralExperts(config).eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    experts.expert_map = ExpertMap(args.slots, num_experts)
    experts._is_expert_parallel = True
    experts.register_forward_pre_hook(map_slots, with_kwargs=True)
    return experts


@torch.no_grad()
def measure(experts: MixtralExperts, args: argparse.Namespace) -> tuple[float, float, float]:
    """(share of duplicates, median time without / with collapsing, largest difference of the outputs)."""
    hidden = torch.randn(args.tokens, args.hidden)
    weights, slots = torch.randn(args.tokens, args.slots).softmax(-1).topk(args.top_k)
    mapped = experts.expert_map.index[slots]
    same = (mapped[:, :, None] == mapped[:, None, :]).tril(-1).any(-1)
    outputs, ratios = {}, []
    for _ in range(args.repeats + 1):  # the first round warms up
        seconds = {}
        for collapse in (False, True):
            experts.expert_map.collapse_duplicates = collapse
            start = time.perf_counter()
            outputs[collapse] = experts(hidden, slots, weights)
            seconds[collapse] = time.perf_counter() - start
        ratios.append(seconds[False] / seconds[True])
    difference = (outputs[False] - outputs[True]).abs().max().item()
    return same.double().mean().item(), statistics.median(ratios[1:]), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=32, help="N")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    torch.manual_seed(0)
    print("| experts stored | duplicate slots | time without / with | largest difference |")
    print("|---:|---:|---:|---:|")
    for num_experts in (args.slots, 28, 24, 20, 16, 12, 8, 4):
        share, ratio, difference = measure(mapped_experts(args, num_experts), args)
        print(f"| {num_experts} | {share:.1%} | {ratio:.2f} | {difference:.1e} |")


if __name__ == "__main__":
    main()
