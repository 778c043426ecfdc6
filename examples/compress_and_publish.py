"""From a model to a published smaller one: compress, evaluate, bring the page up to date, push in one commit.

    python examples/compress_and_publish.py --output half                     # the tiny model, offline, nothing sent
    python examples/compress_and_publish.py --output half --repo me/tiny-half # after `hf auth login`
    python examples/compress_and_publish.py --output half --repo me/Qwen3-30B-A3B-half \
        --model Qwen/Qwen3-30B-A3B --calibration texts.jsonl --data held_out.jsonl
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_mcsmoe
from hf_mcsmoe import MergedSparseMoeConfig, compress_moe, push_checkpoint
from hf_mcsmoe.evaluation import evaluate_model, load_evaluation_data
from hf_mcsmoe.publishing import read_report, write_card, write_pages, write_report
from hf_mcsmoe.publishing.checkpoint_files import checkpoint_files

ASSETS = Path(hf_mcsmoe.__file__).parent / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "tiny-qwen3-moe"), help="folder or Hub id")
    parser.add_argument("--calibration", default=str(ASSETS / "calibration.jsonl"))
    parser.add_argument("--data", default=str(ASSETS / "evaluation.jsonl"), help="text to evaluate on")
    parser.add_argument("--preset", default="joint-obs")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=16, help="of each domain of --data")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    parser.add_argument("--repo", help="owner/name on the Hub; without it nothing is sent")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()

    config = MergedSparseMoeConfig.from_preset(args.preset, keep=args.keep)
    compress_moe(args.model, config, calibration=args.calibration, output_dir=args.output, num_samples=64)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    original = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
    compressed = AutoModelForCausalLM.from_pretrained(args.output, device_map="auto")
    rows = load_evaluation_data(args.data, tokenizer, num_samples=args.rows)
    scores = evaluate_model(compressed, rows, baseline=original)
    print(f"loss {scores.overall.baseline_loss:.3f} -> {scores.overall.loss:.3f} nats per token")

    # The scores go into the report; page and card are made from that, so that no number is written twice.
    write_report(read_report(args.output), args.output, scores)
    write_pages(args.output)
    write_card(args.output, repo_name=args.repo)
    files, _ = checkpoint_files(args.output)
    print(f"{len(files)} files: {', '.join(files)}")
    if args.repo is not None:
        print(push_checkpoint(args.output, args.repo, private=args.private or None).commit_url)


if __name__ == "__main__":
    main()
