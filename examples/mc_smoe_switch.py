"""The experiment of MC-SMoE (Li et al., 2024, https://arxiv.org/abs/2310.01334) on a small Switch Transformer.

A full model of 32 experts a layer becomes one of 8 on average (M-SMoE: aligned, merged by usage, budgets by usage
over all layers, the first MoE layer left alone), which is recovered by distillation from the full one; its experts
then become a low rank plus a tenth of the rows (MC-SMoE), pruned while they are recovered again. Beside it: pruning
the least used experts to the same count with the same recovery, and the paper's ablations. A recovery trains on the
labels too, so there is also the full model trained on for as many steps as both recoveries of MC-SMoE together.

    for seed in 0 1 2; do python examples/train_switch_classifier.py --output switch-$seed --seed $seed; done
    python examples/mc_smoe_switch.py switch-0 switch-1 switch-2 --output examples/mc_smoe/results

Each folder is one seed; results are appended to `switch.json` in the output folder model by model, and those that
are there already are not computed again. `switch.md` is the table. The rank is the paper's proportion of the width,
32 of 768; `mc-smoe, rank 32` is the paper's number itself. The layer that is left alone is a twelfth of the sparse
layers there and a sixth here; `all layers` merges it too.
"""

import argparse
import copy
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mc_smoe.language_names import encode, read_splits
from mc_smoe.scores import bytes_on_disk, count_flops, in_batches, score, tokens_per_second
from mc_smoe.stages import Recovery, calibration_data, decomposed, merged, recipe_of, recover
from mc_smoe.tables import results_table, savings
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

PAPER_RANK, PAPER_WIDTH = 32, 768
KEEP_ROWS = 0.1
MEASURED_NAMES = 64  # in the batch of FLOPs and speed; the paper takes 64 inputs too
TRAINED_ON = "full, trained on"
MAIN = ("full", TRAINED_ON, "pruned by usage", "m-smoe", "mc-smoe")
MERGED: dict[str, dict[str, Any]] = {
    "m-smoe": {"preset": "m-smoe"},
    "pruned by usage": {"preset": "frequency"},
    "no alignment": {"preset": "m-smoe", "alignment": None},
    "uniform budget": {"preset": "m-smoe", "allocation": "uniform"},
    "plain average": {"preset": "m-smoe", "merging": "average"},
    "no distillation": {"preset": "m-smoe"},
    "m-smoe, all layers": {"preset": "m-smoe", "exclude_layers": []},
}
DECOMPOSED = {  # the merged model that it starts from, and the rank, None for the proportional one
    "mc-smoe": ("m-smoe", None),
    "mc-smoe, rank 32": ("m-smoe", PAPER_RANK),
    "mc-smoe, all layers": ("m-smoe, all layers", None),
}


class Experiment:
    """One full model and what becomes of it."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.options = options
        self.numbers = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        self.seed = self.numbers["seed"]
        self.full = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.rows = {split: encode(entries, tokenizer) for split, entries in read_splits().items()}
        batch = in_batches(self.rows["test"], MEASURED_NAMES, tokenizer.pad_token_id)
        self.batch = batch[len(batch) // 2]  # names of middling length
        self.calibration = calibration_data(self.full, self.rows["train"], self.seed)
        self.how = Recovery(options.steps, options.learning_rate, seed=self.seed)
        self.merged: dict[str, PreTrainedModel] = {}

    def result(self, name: str) -> dict[str, Any]:
        """Build, recover and measure one model by its name."""
        found = {"model": name, "seed": self.seed}
        if name == "full":
            model = self.full
        elif name == TRAINED_ON:
            model = copy.deepcopy(self.full)
            steps = self.options.steps + self.options.decomposed_steps
            found |= self.recover(model, replace(self.how, steps=steps, distillation_weight=0.0))
        elif name in MERGED:
            model = merged(self.full, self.calibration, recipe_of(num_experts=self.options.experts, **MERGED[name]))
            how = replace(self.how, distillation_weight=0.0) if name == "no distillation" else self.how
            found |= self.recover(model, how)
            self.merged[name] = model
        else:
            start, rank = DECOMPOSED[name]
            if start not in self.merged:
                self.result(start)
            rank = rank or proportional_rank(self.full.config.d_model)
            model = decomposed(self.merged[start], rank)
            found |= {
                "rank": rank,
                **self.recover(model, replace(self.how, steps=self.options.decomposed_steps), True),
            }
        after = score(model, self.rows["test"])
        return {**found, "accuracy": after.accuracy, "loss": after.loss, **self.cost(model)}

    def recover(self, model: PreTrainedModel, how: Recovery, is_decomposed: bool = False) -> dict[str, Any]:
        """Train a model in place; what it was before."""
        before = score(model, self.rows["test"])
        with tempfile.TemporaryDirectory() as folder:
            keep_rows = KEEP_ROWS if is_decomposed else None
            recover(model, self.full, self.rows["train"], how, Path(folder), keep_rows)
        layout = getattr(model.config, "merged_sparse_moe", {"layers": {}})
        return {
            "accuracy_before": before.accuracy,
            "loss_before": before.loss,
            "recovery": {name: getattr(how, name) for name in ("steps", "learning_rate", "distillation_weight")},
            "experts_per_layer": [entry["num_experts"] for entry in layout["layers"].values()],
        }

    def cost(self, model: PreTrainedModel) -> dict[str, float]:
        """Parameters, bytes of the saved weights, FLOPs a name, and speed beside the full model measured in turns."""
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = bytes_on_disk(Path(folder))
        speeds = tokens_per_second({"model": model, "full": self.full}, self.batch)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": size,
            "flops": count_flops(model, self.batch) / MEASURED_NAMES,
            "tokens_per_second": speeds["model"],
            "full_tokens_per_second": speeds["full"],
        }


def proportional_rank(width: int) -> int:
    """The rank that is to `width` as the paper's 32 is to 768, rounded half up."""
    return max(1, int(width * PAPER_RANK / PAPER_WIDTH + 0.5))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="full models, one a seed")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=[*dict.fromkeys((*MAIN, *MERGED, *DECOMPOSED))])
    parser.add_argument("--experts", type=int, default=8, help="of 32, on average of the layers that are merged")
    parser.add_argument("--steps", type=int, default=100, help="of each recovery of a merged model")
    parser.add_argument("--decomposed-steps", type=int, default=200, help="of the recovery after the decomposition")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args()


def write(results: list[dict[str, Any]], output: Path) -> None:
    """The results so far; the table has the models of the paper first, then the ablations."""
    output.mkdir(parents=True, exist_ok=True)
    unfinished = output / "switch.json.tmp"
    unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    shutil.move(unfinished, output / "switch.json")
    order = [*MAIN, "mc-smoe, rank 32", "m-smoe, all layers", "mc-smoe, all layers"]
    main = [result for name in order for result in results if result["model"] == name]
    ablations = [result for result in results if result not in main]
    parts = [results_table(main), "", "Ablations of m-smoe:", "", results_table(ablations)] if ablations else []
    (output / "switch.md").write_text("\n".join(parts or [results_table(main)]) + "\n", encoding="utf-8")


def main() -> None:
    options = arguments()
    stored = options.output / "switch.json"
    results = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else []
    names = options.models or [*dict.fromkeys((*MAIN, *MERGED, *DECOMPOSED))]
    for folder in options.folders:
        experiment = Experiment(folder, options)
        for name in names:
            if any(r["model"] == name and r["seed"] == experiment.seed for r in results):
                continue
            torch.manual_seed(experiment.seed)
            results.append(experiment.result(name))
            write(results, options.output)
            print({key: results[-1][key] for key in ("model", "seed", "accuracy", "loss", "parameters")}, flush=True)
    write(results, options.output)
    print(results_table(results))
    for model in ("m-smoe", "mc-smoe"):
        if any(result["model"] == model for result in results) and any(r["model"] == "full" for r in results):
            print(model, savings(results, model))


if __name__ == "__main__":
    main()
