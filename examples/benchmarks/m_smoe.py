"""Presets side by side, without training: loss on held-out text and bytes on disk, in both layouts.

    python examples/benchmarks/m_smoe.py --model hf_mcsmoe/assets/tiny-qwen3-moe \\
        --calibration hf_mcsmoe/assets/calibration.jsonl --data hf_mcsmoe/assets/evaluation.jsonl

Every result is written, loaded again and compared: logits must be equal bit by bit, and the tensors in the file must
take the bytes that `plan` predicted.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mcsmoe import compress_moe, load_calibration, plan
from hf_mcsmoe.evaluation import evaluate_model, load_evaluation_data
from hf_mcsmoe.recipe_reading import recipe_from_preset

VARIANTS = [
    ("m-smoe", "mapped", {}),
    ("m-smoe", "mapped", {"allocation": "uniform"}),
    ("m-smoe", "native", {}),
    ("frequency", "native", {}),
    ("narrow-obs", "native", {}),
    ("narrow-obs-matched", "native", {}),
    ("joint-obs", "mapped", {}),
    ("joint-obs-matched", "mapped", {}),
    ("narrow-obs-corrected", "native", {}),
    ("narrow-obs-corrected-matched", "native", {}),
    ("joint-obs-corrected", "mapped", {}),
    ("joint-obs-corrected-matched", "mapped", {}),
]


def bytes_on_disk(folder: Path) -> tuple[int, int]:
    """(all tensors, tensors of routed experts) in the safetensors files of a folder."""
    total, experts = 0, 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                total += tensor.numel() * tensor.element_size()
                if ".experts." in name and tensor.is_floating_point():  # no map, no offsets of neurons
                    experts += tensor.numel() * tensor.element_size()
    return total, experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True, help="text or .npy tokens to evaluate on")
    parser.add_argument("--keep", default="0.75,0.5,0.25")
    parser.add_argument("--presets", help="only these, with commas between them")
    parser.add_argument("--rows", type=int, help="most rows of calibration data")
    parser.add_argument("--evaluation-rows", type=int, help="most rows of each domain")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_calibration(args.calibration, tokenizer, num_samples=args.rows)
    rows = load_evaluation_data(args.data, tokenizer, num_samples=args.evaluation_rows)
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    score = evaluate_model(original, rows, progress=False).overall
    probe = next(iter(rows.values())).batches[0].inputs["input_ids"]
    print(f"{data.num_tokens} calibration tokens, {score.tokens} evaluated tokens, {args.dtype}")
    print("| method | layout | kept | perplexity | loss | increase | expert bytes | of the original |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    print(f"| original | - | 100 % | {score.perplexity:.2f} | {score.loss:.4f} | | | |")
    results = [{"method": "original", "loss": score.loss, "perplexity": score.perplexity}]
    wanted = args.presets.split(",") if args.presets else [preset for preset, _, _ in VARIANTS]
    for preset, layout, changes in [variant for variant in VARIANTS if variant[0] in wanted]:
        for keep in map(float, args.keep.split(",")):
            recipe = recipe_from_preset(preset, keep=keep, layout=layout, **changes)
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
            planned = plan(model, recipe)
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder) / "model"
                compress_moe(model, recipe, calibration=data, output_dir=folder, progress=False)
                total, experts = bytes_on_disk(folder)
                if (total, experts) != (planned.total_bytes_after, planned.expert_bytes_after):
                    raise SystemExit(f"{total, experts} bytes on disk, planned {planned.total_bytes_after}")
                reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
                with torch.no_grad():
                    if not torch.equal(reloaded(probe).logits, model(probe).logits):
                        raise SystemExit("reloaded logits differ")
            new = evaluate_model(reloaded, rows, progress=False).overall
            name = preset + "".join(f", {value}" for value in changes.values())
            share = planned.expert_bytes_after / planned.expert_bytes_before
            print(
                f"| {name} | {layout} | {keep:.0%} | {new.perplexity:.2f} | {new.loss:.4f} | "
                f"{new.loss - score.loss:+.4f} | {experts:,} | {share:.1%} |"
            )
            results.append(
                {"method": name, "layout": layout, "keep": keep, "loss": new.loss, "perplexity": new.perplexity}
                | {"expert_bytes": experts, "total_bytes": total, "seconds": model.compression_report.seconds}
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
