"""Every method on one model: both layouts, several sizes and calibration seeds, judged domain by domain.

    python examples/benchmarks/methods.py --model MODEL --calibration calib.npy \\
        --data python=eval.python.npy de=eval.de.npy --output results

For each seed one calibration serves all methods that are not sequential (`compare_methods`). With --alone every method
is also run by itself at one size, with its own calibration, for its time beside a plain forward over the calibration
tokens and for the memory that it takes beyond the model. Finished results are kept: the same command goes on.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fidelity_data import evaluation_data
from fidelity_measure import compress, forward_seconds
from methods_tables import write_plot, write_tables
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_mcsmoe import PRESETS, Calibration, Recipe, load_calibration
from hf_mcsmoe.compare import ComparedResult, compare_methods, recipes_to_compare
from hf_mcsmoe.method_table import layouts_of

ALONE_KEEP = 0.5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", required=True, nargs="+", help="name=path of each domain; text or .npy tokens")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", help="presets with commas between them; all without it")
    parser.add_argument("--keep", default="0.75,0.5,0.25")
    parser.add_argument("--layouts", default="mapped,native")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, help="most rows of calibration data")
    parser.add_argument("--evaluation-rows", type=int, help="most rows of each domain")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--alone", action="store_true", help="also run each method by itself, for time and memory")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    rows = evaluation_data(args.data, tokenizer, args.evaluation_rows)
    names = args.methods.split(",") if args.methods else sorted(PRESETS.keys() - {"auto"})
    keeps, layouts = [float(keep) for keep in args.keep.split(",")], args.layouts.split(",")
    args.output.mkdir(parents=True, exist_ok=True)
    results = read(args.output)
    for seed in map(int, args.seeds.split(",")):
        data = load_calibration(args.calibration, tokenizer, num_samples=args.rows, seed=seed)
        usable = [name for name in names if set(layouts) & set(layouts_of(name))]
        wanted = recipes_to_compare(usable, keeps, layouts, seed=seed)
        left = [recipe for recipe in wanted if not is_done(results["compared"], recipe, seed)]

        def keep_result(result: ComparedResult, seed: int = seed) -> None:
            results["compared"].append({"seed": seed, **compact(result)})
            write(args.output, results)

        compare_methods(model, left, data, rows, report=keep_result)
        if args.alone and seed == int(args.seeds.split(",")[0]):
            alone = recipes_to_compare(usable, [ALONE_KEEP], None, seed=seed)
            measure_alone(model, alone, data, results, args.output)
    write_tables(results, args.output / "methods.md")
    write_plot(results, args.output / "methods.png")


def measure_alone(
    model: AutoModelForCausalLM, recipes: Iterable[Recipe], data: Calibration, results: dict, folder: Path
) -> None:
    """Time and memory of each method by itself, beside the forwards over the same tokens before and after it."""
    todo = [recipe for recipe in recipes if all(row["method"] != recipe.preset for row in results["alone"])]
    before = [forward_seconds(model, data) for _ in range(2)][1:] if todo else []  # the first one warms up
    for recipe in todo:
        try:
            _, measured = compress(copy.deepcopy(model), recipe, data)
        except ValueError as error:
            measured = {"skipped": str(error)}
        after = [forward_seconds(model, data) for _ in range(2)]
        row = {"method": recipe.preset, "layout": recipe.layout, "keep": recipe.keep}
        forward = {"forward_seconds": statistics.median([*before, *after])}
        results["alone"].append({**row, **forward, **measured})
        write(folder, results)
        before = after


def compact(result: ComparedResult) -> dict[str, Any]:
    """A result as it is kept: without the parts that all have in common."""
    values = result.to_dict()
    evaluation = values.pop("evaluation")
    if evaluation is not None:
        kept = ("tokens", "loss", "baseline_loss", "kl", "top1_agreement", "perplexity")
        values["overall"] = {name: evaluation["overall"][name] for name in kept}
        values["domains"] = {name: {key: score[key] for key in kept} for name, score in evaluation["domains"].items()}
    del values["recipe"]
    return values


def is_done(rows: list[dict], recipe: Recipe, seed: int) -> bool:
    """Whether there is a result of a recipe."""
    key = (recipe.preset, recipe.layout, recipe.keep, seed)
    return any((row["method"], row["layout"], row["keep"], row["seed"]) == key for row in rows)


def read(folder: Path) -> dict[str, list]:
    """What an earlier run has finished."""
    path = folder / "methods.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"compared": [], "alone": []}


def write(folder: Path, results: dict[str, list]) -> None:
    """All results so far, one line each, in one step."""
    sections = []
    for name, rows in results.items():
        body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        sections.append(f' "{name}": [\n{body}\n ]')
    temporary = folder / ".methods.json"
    temporary.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")
    temporary.replace(folder / "methods.json")


if __name__ == "__main__":
    main()
