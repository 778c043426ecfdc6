"""MC-SMoE on a causal language model: held-out perplexity after each stage.

Merge half of the experts of each layer away (M-SMoE), recover by distillation from the full model, decompose the
merged experts into a low rank plus a tenth of the rows, and recover again while the rows are pruned
(Li et al., 2024, https://arxiv.org/abs/2310.01334). With the model and the text that ship with the package, about
six minutes on one CPU core:

    python examples/mc_smoe_causal.py

With a model of your own, and token ids as .npy arrays of rows (R, S) or texts as .txt, .jsonl or .parquet files:

    python examples/mc_smoe_causal.py --model MODEL --train-tokens a.npy b.npy --eval-tokens held_out.npy
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mc_smoe.scores import bytes_on_disk, count_flops
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

import hf_mcsmoe
from hf_mcsmoe import compress_moe, load_calibration
from hf_mcsmoe.calibration import Calibration
from hf_mcsmoe.decompose import decompose_merged
from hf_mcsmoe.evaluation import evaluate_model
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.training import DistillationArguments, DistillationTrainer, SparsityScheduleCallback

ASSETS = Path(hf_mcsmoe.__file__).parent / "assets"
CALIBRATION_ROWS = 64
Rows = list[dict[str, list[int]]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ASSETS / "tiny-qwen3-moe"))
    parser.add_argument("--train-tokens", nargs="+", default=[str(ASSETS / "calibration.jsonl")])
    parser.add_argument("--eval-tokens", default=str(ASSETS / "evaluation.jsonl"))
    parser.add_argument("--eval-rows", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the experts that merging leaves")
    parser.add_argument("--rank", type=int, help="default: 32 for a hidden size of 768, in proportion for others")
    parser.add_argument("--keep-rows", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=150, help="of each of the two recoveries")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for causal.json and causal.md")
    return parser.parse_args()


def training_rows(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Full rows of token ids from all training files, about as many of each as two recoveries see."""
    wanted = 2 * options.steps * options.batch_size // len(options.train_tokens) + 1
    rows = []
    for file in options.train_tokens:
        size = {"num_samples": wanted, "sequence_length": options.sequence_length}
        data = load_calibration(file, tokenizer, **size, held_out_fraction=0, seed=options.seed)
        for batch in data.batches:
            ids = batch.inputs["input_ids"][batch.token_mask.all(1)]
            rows += [{"input_ids": row, "labels": row} for row in ids.tolist()]
    return [row for row in rows if len(row["input_ids"]) == options.sequence_length]


def recover(student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows, options: argparse.Namespace) -> None:
    """Train a compressed model in place; the rows of decomposed experts are pruned meanwhile."""
    is_decomposed = any("form" in layout for layout in student.config.merged_sparse_moe["layers"].values())
    with tempfile.TemporaryDirectory() as folder:
        training = DistillationArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=16,
            adam_beta2=0.98,
            weight_decay=0.01,
            optim="adamw_torch_fused",
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
            dataloader_pin_memory=False,
        )
        DistillationTrainer(
            model=student,
            args=training,
            teacher=teacher,
            train_dataset=rows,
            data_collator=default_data_collator,
            callbacks=[SparsityScheduleCallback(final_keep=options.keep_rows)] if is_decomposed else [],
        ).train()
    for parameter in student.parameters():
        parameter.requires_grad_(True)  # frozen routers are a matter of this training only
    student.eval()


def measure(model: PreTrainedModel, name: str, held_out: Calibration) -> dict[str, Any]:
    """Held-out loss and perplexity, parameters, bytes of the saved weights, FLOPs a token."""
    scores = evaluate_model(model, {"held out": held_out}, progress=False).overall
    batch = {"input_ids": held_out.batches[0].inputs["input_ids"][:1]}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = bytes_on_disk(Path(folder))
    result = {
        "model": name,
        "loss": scores.loss,
        "loss_standard_error": scores.loss_standard_error,
        "perplexity": scores.perplexity,
        "parameters": model.num_parameters(),
        "bytes": size,
        "flops_per_token": count_flops(model, batch) / batch["input_ids"].numel(),
    }
    print(f"{name}: loss {scores.loss:.4f}, perplexity {scores.perplexity:.2f}", flush=True)
    return result


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every stage, measured."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    full = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    rows = training_rows(options, tokenizer)
    size = {"num_samples": options.eval_rows, "sequence_length": options.sequence_length}
    held_out = load_calibration(options.eval_tokens, tokenizer, **size, seed=options.seed)
    results = [measure(full, "full", held_out)]
    student = copy.deepcopy(full)
    calibration = [row["input_ids"] for row in rows[:: max(1, len(rows) // CALIBRATION_ROWS)]]
    recipe = recipe_from_preset("m-smoe", keep=options.keep, seed=options.seed)
    student = compress_moe(student, recipe, calibration=calibration, progress=False)
    results.append(measure(student, "m-smoe", held_out))
    recover(student, full, rows, options)
    results.append(measure(student, "m-smoe, recovered", held_out))
    options.rank = options.rank or max(1, round(32 * full.config.hidden_size / 768))
    decompose_merged(student, rank=options.rank, keep_rows=1.0, progress=False)
    recover(student, full, rows[::-1], options)
    results.append(measure(student, "mc-smoe, recovered", held_out))
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The stages as Markdown."""
    lines = ["| model | loss (nats) | perplexity | parameters | bytes | MFLOPs a token |", "|---|---|---|---|---|---|"]
    for one in results:
        lines.append(
            f"| {one['model']} | {one['loss']:.4f} ± {one['loss_standard_error']:.4f} | {one['perplexity']:.2f} | "
            f"{one['parameters']:,} | {one['bytes']:,} | {one['flops_per_token'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    set_seed(options.seed)
    start = time.perf_counter()
    results = run(options)
    print(table(results))
    print(f"{time.perf_counter() - start:.0f} seconds")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        said = {name: getattr(options, name) for name in ("keep", "rank", "keep_rows", "steps", "batch_size")}
        written = {"options": {**said, "learning_rate": options.learning_rate}, "results": results}
        (options.output / "causal.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        (options.output / "causal.md").write_text(table(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
