"""Compress a model that does not fit in memory: layer by layer, from its files to the files of the result.

    python examples/stream_a_large_model.py --output half                     # the tiny model that ships, offline
    python examples/stream_a_large_model.py --model Qwen/Qwen3-235B-A22B --calibration texts.jsonl --output half

Two decoder layers, the embeddings and `--hidden-states-gb` of hidden states are in memory at a time. Killed? The same
command goes on after the last layer that was finished. Then `hf-mcsmoe report half` and `hf-mcsmoe push half REPO`.
"""

import argparse
from pathlib import Path

import hf_mcsmoe
from hf_mcsmoe import Recipe, compress_moe, plan

ASSETS = Path(hf_mcsmoe.__file__).parent / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "tiny-qwen3-moe"), help="folder or Hub id with safetensors")
    parser.add_argument("--calibration", default=str(ASSETS / "calibration.jsonl"))
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    parser.add_argument(
        "--hidden-states-gb", type=float, default=1.0, help="kept in memory; the rest goes to the disk"
    )
    args = parser.parse_args()

    # With allocation="uniform" the weights are read once; sharing one budget among the layers takes a second pass.
    recipe = Recipe(keep=args.keep, allocation="uniform")
    planned = plan(args.model, recipe)
    print(f"planned: {planned.total_bytes_before:,} -> {planned.total_bytes_after:,} bytes")
    result = compress_moe(
        args.model,
        recipe,
        calibration=args.calibration,
        num_samples=args.num_samples,
        output_dir=args.output,
        executor="streaming",
        hidden_states_bytes=int(args.hidden_states_gb * 1e9),
    )
    # Its weights are in the folder, not in memory.
    report, summary = result.compression_report, result.streaming_summary
    print(f"done: {report.total_bytes_after:,} bytes of parameters in {report.seconds:.0f} s on {summary.device}")
    print(f"read {summary.bytes_read:,} bytes in {summary.passes} pass, wrote {summary.bytes_written:,}")
    peaks = {name: f"{size:,}" for name, size in report.peak_memory.items() if size is not None}
    print(f"largest memory in use, bytes: {peaks}")
    print(f"decoder layers that an interrupted run had done: {summary.resumed_visits} of {summary.num_decoder_layers}")


if __name__ == "__main__":
    main()
