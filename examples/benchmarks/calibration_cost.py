"""What calibration and compression cost beside a plain forward: time as a ratio in one run, and peak memory.

    python examples/benchmarks/calibration_cost.py --model hf_mcsmoe/assets/tiny-qwen3-moe
    python examples/benchmarks/calibration_cost.py --model MODEL --calibration tokens.npy --rows 96

Plain forwards and calibration passes over the same batches take turns; the ratio is that of their medians. Memory is
the growth of the process's peak during compression, in units of one layer's experts and of the whole model.
"""

import argparse
import gc
import statistics
import time

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mcsmoe import compress_moe, load_calibration
from hf_mcsmoe.executors.in_memory import collect_statistics
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.recipe_reading import recipe_from_preset


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def reset_peak() -> None:
    """Start a new peak measurement, where Linux lets us."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def read_peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", help=".npy tokens or text; default: the text that ships")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    is_tokens = (args.calibration or "").endswith(".npy")
    tokenizer = None if is_tokens else AutoTokenizer.from_pretrained(args.model)
    options = {"num_samples": args.rows, "batch_size": args.batch_size}
    data = load_calibration(args.calibration, tokenizer, **options, held_out_fraction=0)
    recipe = recipe_from_preset("m-smoe")
    layers = find_layers(model)

    @torch.no_grad()
    def plain() -> None:
        for batch in data.batches:
            model(**batch.inputs)

    def calibrate() -> None:
        collect_statistics(model, layers, data, recipe.statistics_needed(), progress=False)

    plain(), calibrate()  # warm-up
    times = [(seconds(plain), seconds(calibrate)) for _ in tqdm(range(args.repeats), desc="timing")]
    forward, calibration = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [b / a for a, b in times]
    print(f"{data.num_tokens} tokens, {args.dtype}, {torch.get_num_threads()} threads")
    print(f"plain forward {forward:.2f} s, calibration {calibration:.2f} s")
    print(f"ratio {calibration / forward:.3f} (pairs {min(ratios):.3f} to {max(ratios):.3f})")

    layer_bytes = max(layer.num_experts * layer.bytes_per_expert for layer in layers)
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    reset_peak()
    calibrate()
    forward_peak = read_peak()  # activations of the calibration forward are part of this
    reset_peak()
    compress_moe(model, recipe, calibration=data, progress=False)
    growth = read_peak() - forward_peak
    print(f"model {model_bytes / 1e6:.1f} MB, experts of one layer {layer_bytes / 1e6:.1f} MB")
    print(f"compress_moe peaks {growth / 1e6:+.1f} MB = {growth / layer_bytes:+.2f} layers above calibration alone")


if __name__ == "__main__":
    main()
