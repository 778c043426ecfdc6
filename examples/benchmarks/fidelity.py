"""How much of a model each recipe keeps at the same bytes: loss, KL, agreement, time, memory, speed.

    python examples/benchmarks/fidelity.py --output fidelity
    python examples/benchmarks/fidelity.py --model Qwen/Qwen3-30B-A3B --calibration texts.jsonl \\
        --eval code=code.jsonl prose=prose.txt --recipes joint-obs narrow-obs auto --keep 0.5 --output fidelity

Without options it runs on the model and the text that ship with the package. A recipe is a preset, changes to it may
follow ("m-smoe:refit=least_squares,allocation=uniform"), or a YAML file. Experts are rounded to the dtype of the
checkpoint before they are tested, so what is tested is what a file of the bytes shown would hold; every result, and
the original, is also tested with its experts rounded to 8 bits (one scale a row). "x forward" is the time of the
compression over that of one plain forward over the same tokens, taken just before it. Results are appended to
results.jsonl as they come; the same command goes on where it was stopped. results.md and results.png show all of it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from fidelity_data import ASSETS, calibration_sources, calibration_without, evaluation_data
from fidelity_measure import compress, forward_seconds, scores, tokens_per_second
from fidelity_rounding import round_to_dtype, round_to_int8
from fidelity_tables import write_plot, write_tables
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_mcsmoe import Recipe
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.recipe_reading import recipe_from_dict, recipe_from_preset, recipe_from_yaml

RECIPES = ["m-smoe", "frequency:layout=native", "narrow-obs", "joint-obs"]
KEYS = ("recipe", "keep", "seed", "weights", "left_out")


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sources = calibration_sources(args.calibration)
    data = evaluation_data(args.eval, tokenizer, args.evaluation_rows)
    if args.leave_out is not None:
        calibration_without(sources, args.leave_out, tokenizer, args.rows, 0)  # refuses what cannot be left out
        if args.leave_out not in data:
            raise SystemExit(f"--leave-out is {args.leave_out!r}, but --eval has {sorted(data)}. Give its text too.")
        data = {args.leave_out: data[args.leave_out]}
    settings = {
        "model": Path(args.model).name,
        "calibration": sorted(sources),
        "rows": args.rows,
        "evaluation_rows": args.evaluation_rows,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
    }
    results = Results(args.output, settings)
    original = load(args)
    if not results.has(recipe="original", keep=1.0, seed=None, left_out=args.leave_out):
        results.add(measure_original(args, original, data))
    wanted = [(spec, keep, seed) for seed in args.seeds for spec in args.recipes for keep in args.keep]
    for spec, keep, seed in wanted:
        recipe = recipe_of(spec, keep, seed)
        if results.has(recipe=spec, keep=keep, seed=seed, left_out=args.leave_out):
            continue
        calibration = calibration_without(sources, args.leave_out, tokenizer, args.rows, seed)
        try:
            rows = measure(args, original, recipe, calibration, data)
        except ValueError as error:
            print(f"{spec} at {keep}: left out. {error}")
            continue
        results.add([{"recipe": spec, "keep": keep, "seed": seed, **row} for row in rows])
    print((args.output / "results.md").read_text(encoding="utf-8"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "tiny-qwen3-moe"))
    parser.add_argument(
        "--calibration", nargs="+", default=[str(ASSETS / "calibration.jsonl")], help="path or name=path"
    )
    parser.add_argument("--eval", nargs="+", default=[], help="name=path of each domain; text or .npy of tokens")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.75, 0.5, 0.25])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", type=int, help="most calibration rows of each domain")
    parser.add_argument("--evaluation-rows", type=int, help="most rows to test on of each domain")
    parser.add_argument("--leave-out", metavar="DOMAIN", help="calibrate without this domain and test on it alone")
    parser.add_argument("--dtype", default="float32", help="in which everything is computed")
    parser.add_argument("--device-map", help="as in from_pretrained")
    parser.add_argument("--output", type=Path, default=Path("fidelity"))
    return parser.parse_args()


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The original model."""
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map=args.device_map).eval()


def stored_dtype(args: argparse.Namespace) -> torch.dtype:
    """The dtype of the checkpoint, or that of the computation where it says none."""
    dtype = AutoConfig.from_pretrained(args.model).dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or args.dtype)


def recipe_of(spec: str, keep: float, seed: int) -> Recipe:
    """The recipe of a preset, of a preset and changes, or of a YAML file."""
    if spec.endswith((".yaml", ".yml")):
        return recipe_from_dict({**recipe_from_yaml(spec).to_dict(), "num_experts": None, "keep": keep, "seed": seed})
    preset, _, written = spec.partition(":")
    changes = dict(change.split("=", 1) for change in written.split(",") if change)
    changes = {name: yaml.safe_load(value) for name, value in changes.items()}
    return recipe_from_preset(preset, keep=keep, seed=seed, **changes)


def measure_original(args: argparse.Namespace, original: PreTrainedModel, data: dict[str, Any]) -> list[dict]:
    """Rows of the model itself: as it is, and with 8-bit experts."""
    model, modules, stored = load(args), [layer.name for layer in find_layers(original)], stored_dtype(args)
    common = {"recipe": "original", "keep": 1.0, "seed": None, "left_out": args.leave_out, "layout": None}
    size, speed = round_to_dtype(model, modules, stored), tokens_per_second(model, data)
    as_is = {"weights": _name(stored), "expert_bytes": size, "tokens_per_second": speed, **scores(model, None, data)}
    size = round_to_int8(model, modules, stored)
    rounded = {"weights": "int8", "expert_bytes": size, **scores(model, original, data)}
    return [{**common, **as_is}, {**common, **rounded}]


def measure(
    args: argparse.Namespace, original: PreTrainedModel, recipe: Recipe, calibration: Any, data: dict[str, Any]
) -> list[dict]:
    """Rows of one result: as it is, and with 8-bit experts."""
    modules, stored = [layer.name for layer in find_layers(original)], stored_dtype(args)
    plain = forward_seconds(original, calibration)
    model, cost = compress(load(args), recipe, calibration)
    cost |= {"forward_seconds": plain, "times_forward": cost["seconds"] / plain}
    taken = model.compression_report.recipe
    common = {"left_out": args.leave_out, "layout": recipe.layout, "preset": taken.get("preset")}
    size, speed = round_to_dtype(model, modules, stored), tokens_per_second(model, data)
    as_is = {"expert_bytes": size, "tokens_per_second": speed, **cost, **scores(model, original, data)}
    size = round_to_int8(model, modules, stored)
    rounded = {"expert_bytes": size, **scores(model, original, data)}
    return [{"weights": _name(stored), **common, **as_is}, {"weights": "int8", **common, **rounded}]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Results:
    """The rows measured so far, in a folder; the rows of one result are written together."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        # A line without its end was being written when the run was stopped.
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            self.path.write_text(complete, encoding="utf-8")
        self.rows = [json.loads(line) for line in complete.splitlines()]
        other = next((row["settings"] for row in self.rows if row["settings"] != settings), None)
        if other is not None:
            raise SystemExit(f"{self.path} was made with {other}, not {settings}. Choose another --output.")

    def has(self, **values: Any) -> bool:
        """Whether both rows of a result are there."""
        found = [row for row in self.rows if all(row[name] == value for name, value in values.items())]
        return len({row["weights"] for row in found}) == 2

    def add(self, rows: list[dict]) -> None:
        """Append rows, and write tables and plot anew."""
        rows = [{**{key: row[key] for key in KEYS}, **row, "settings": self.settings} for row in rows]
        self.rows += rows
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        write_tables(self.rows, self.folder / "results.md")
        write_plot(self.rows, self.folder / "results.png")


if __name__ == "__main__":
    main()
