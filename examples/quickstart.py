"""Compress a MoE model to half of its experts, save it, load it as any model and let it write. Seconds.

python examples/quickstart.py                                   # the tiny model that ships, offline
python examples/quickstart.py --model Qwen/Qwen3-30B-A3B --calibration texts.jsonl --output out
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_mcsmoe
from hf_mcsmoe import MergedSparseMoeConfig, compress_moe

ASSETS = Path(hf_mcsmoe.__file__).parent / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "tiny-qwen3-moe"), help="folder or Hub id")
    parser.add_argument(
        "--calibration", default=str(ASSETS / "calibration.jsonl"), help="text the router is watched on"
    )
    parser.add_argument("--output", help="folder of the result; default: a temporary one")
    parser.add_argument("--prompt", default="def read_file(path):\n")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    before = model.num_parameters()

    config = MergedSparseMoeConfig.from_preset("m-smoe", keep=0.5)
    model = compress_moe(model, config, calibration=args.calibration, tokenizer=tokenizer, num_samples=64)
    print(f"{before:,} -> {model.num_parameters():,} parameters")
    for layer in model.compression_report.layers:
        print(f"{layer.layer}: {layer.num_experts_before} -> {layer.num_experts_after} experts")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.output or temporary)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder)

    inputs = tokenizer(args.prompt, return_tensors="pt").to(reloaded.device)
    written = reloaded.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    main()
