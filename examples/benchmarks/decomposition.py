"""How much of the experts' outputs, and of the model's quality, each decomposition loses at equal bytes.

    python examples/benchmarks/decomposition.py

All experts of the model that ships with the package are decomposed, none merged. "output error" is |(W - W') X|^2 /
|W X|^2 on tokens that calibration did not see, averaged over all matrices; "loss" is the model's on held-out text.
Bytes are those of factors, rows and row indices as a share of the dense experts'.
"""

import argparse
import copy
import statistics
import time
from importlib.resources import files

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_mcsmoe import Calibration, Recipe, load_calibration
from hf_mcsmoe.executors.in_memory import collect
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layer.expert_decomposition import decompose_experts
from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.modeling.install_forms import install_low_rank_sparse
from hf_mcsmoe.observation.input_grams import input_grams
from hf_mcsmoe.outcome import adopt_mapped
from hf_mcsmoe.training import prune_by_gradients
from hf_mcsmoe.training.gradient_importance import labelled
from hf_mcsmoe.types import MoeLayer

METHODS = {
    "plain": ("low_rank_sparse", {}),
    "plain, alternating": ("low_rank_sparse", {"alternations": 8}),
    "whitened": ("whitened_low_rank_sparse", {"alternations": 0}),
    "whitened, alternating": ("whitened_low_rank_sparse", {}),
    "plain, rows by gradients": ("low_rank_sparse", {"keep_rows": 1.0}),
    "whitened, rows by gradients": ("whitened_low_rank_sparse", {"keep_rows": 1.0}),
}


def decompose(model: PreTrainedModel, rule: str, options: dict, grams: dict[str, dict[str, list[Tensor]]]) -> None:
    """Decompose all experts of a model in place."""
    layouts = {}
    for layer in find_layers(model):
        weights = layer.family.view(layer, layer.family.stack(layer, layer.expert_parameters))
        factors, biases = decompose_experts(weights, rule, options, grams[layer.name])
        layout = {"num_slots": layer.num_slots, "num_experts": layer.num_experts}
        layout |= {"has_dropped": False, "collapse_duplicates": False}
        install_low_rank_sparse(layer, factors, biases, torch.arange(layer.num_slots), layout)
        layouts[layer.name] = layout
    adopt_mapped(model, Recipe(keep=1.0), layouts, type(model).__name__, {})


def grams_of(model: PreTrainedModel, layers: list[MoeLayer], data: Calibration) -> dict[str, dict[str, list[Tensor]]]:
    """Grams of what the matrices of all experts are given for all tokens."""
    tokens = len(data.batches) * max(batch.token_mask.numel() for batch in data.batches)  # as many of each batch
    collected = collect(model, layers, data, frozenset(), calibration_tokens=tokens, progress=False)
    return {layer.name: input_grams(layer, collected[layer.name].calibration) for layer in layers}


@torch.no_grad()
def loss_of(model: PreTrainedModel, data: Calibration) -> float:
    """Mean loss of a token."""
    total = tokens = 0
    for batch in data.batches:
        inputs = labelled(batch, model)
        predicted = int((inputs["labels"][:, 1:] != -100).sum())
        total += model(**inputs).loss.item() * predicted
        tokens += predicted
    return total / tokens


def expert_bytes(model: PreTrainedModel) -> int:
    """Bytes of the tensors of all experts modules, expert maps left out."""
    modules = form_layers(model) or {layer.name: layer.experts for layer in find_layers(model)}
    tensors = [
        value for one in modules.values() for name, value in one.state_dict().items() if "expert_map" not in name
    ]
    return sum(value.numel() * value.element_size() for value in tensors)


def output_error(model: PreTrainedModel, weights: dict[str, dict[str, Tensor]], grams: dict) -> float:
    """Mean over all matrices with inputs of the share of their outputs that is lost."""
    shares = []
    for path, experts in form_layers(model).items():
        dense = experts.densify().tensors()
        for name, matrices in weights[path].items():
            lost = matrices.double() - dense[name].double()
            gram = torch.stack(grams[path][name])
            energy = [((x @ gram) * x).sum((1, 2)) for x in (lost, matrices.double())]
            used = energy[1] > 0
            shares += (energy[0][used] / energy[1][used]).tolist()
    return statistics.mean(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--keep-rows", type=float, default=0.1)
    parser.add_argument("--rows", type=int, default=64, help="calibration rows of 256 tokens")
    parser.add_argument("--evaluation-rows", type=int, default=48, help="held-out rows of 256 tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    assets = files("hf_mcsmoe") / "assets"
    folder = str(assets / "tiny-qwen3-moe")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    how = {"tokenizer": tokenizer, "sequence_length": 256, "held_out_fraction": 0}
    data = load_calibration(str(assets / "calibration.jsonl"), num_samples=args.rows, batch_size=4, **how)
    unseen = load_calibration(str(assets / "evaluation.jsonl"), num_samples=args.evaluation_rows, batch_size=8, **how)
    layers = find_layers(model)
    grams, unseen_grams = (grams_of(model, layers, one) for one in (data, unseen))
    weights = {x.name: x.family.view(x, x.family.stack(x, x.expert_parameters)).tensors() for x in layers}
    dense_bytes = expert_bytes(model)
    print(f"original: loss {loss_of(model, unseen):.3f}, experts {dense_bytes / 1e6:.2f} MB")
    for rank in args.rank:
        print(f"\nrank {rank}, rows {args.keep_rows:g}")
        print(f"{'':28}{'bytes':>8}{'output error':>14}{'loss':>8}{'seconds':>9}")
        for name, (rule, changes) in METHODS.items():
            small = copy.deepcopy(model)
            start = time.perf_counter()
            decompose(small, rule, {"rank": rank, "keep_rows": args.keep_rows, **changes}, grams)
            if "gradients" in name:
                prune_by_gradients(small, data, keep_rows=args.keep_rows, progress=False)
            seconds = time.perf_counter() - start
            error, loss = output_error(small, weights, unseen_grams), loss_of(small, unseen)
            share = expert_bytes(small) / dense_bytes
            print(f"{name:28}{share:8.1%}{error:14.4f}{loss:8.3f}{seconds:9.1f}", flush=True)


if __name__ == "__main__":
    main()
