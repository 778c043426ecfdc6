"""Compress the tiny model that ships with every preset to one half, and write the model cards of the results. Offline.

python examples/make_model_cards.py               # measure and write all cards: minutes
python examples/make_model_cards.py --render      # write the cards again from the reports that are there: seconds

Beside each card is the report that it is written from, and a hash of what was measured. Two runs on one machine give
the same bytes: durations and memory are left out, one thread computes, and everything is seeded. On another machine
the last digits may differ.
"""

import argparse
import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

import hf_mcsmoe
from hf_mcsmoe import compress_moe
from hf_mcsmoe.evaluation import load_evaluation_data
from hf_mcsmoe.evaluation.generation import PROMPT_TOKENS, prompts_from_rows
from hf_mcsmoe.evaluation.run import Extras, beside, evaluate_whole
from hf_mcsmoe.loading import load_model, load_tokenizer
from hf_mcsmoe.local_paths import without_paths
from hf_mcsmoe.publishing import model_card, write_report
from hf_mcsmoe.publishing.card import local_licence
from hf_mcsmoe.recipe import PRESETS, Recipe
from hf_mcsmoe.recipe_reading import recipe_from_preset

ASSETS = Path(hf_mcsmoe.__file__).parent / "assets"
MODEL = ASSETS / "tiny-qwen3-moe"
CARDS = Path(__file__).parents[1] / "model_cards"
KEEP = 0.5
CALIBRATION_ROWS, ROW_TOKENS, EVALUATION_ROWS, PROMPTS = 64, 256, 32, 16
WITHOUT_CARD = ("auto",)  # it takes one of the others
MACHINE_KEYS = ("seconds", "peak_memory")  # what differs from run to run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CARDS, help="folder for the cards")
    parser.add_argument("--presets", nargs="+", default=presets_with_card(), help="default: all")
    parser.add_argument("--render", action="store_true", help="measure nothing: only write the cards again")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for preset in args.presets:
        path = report_file(args.output, preset)
        if not args.render:
            path.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory() as temporary:
                write_report(measured(preset), temporary)
                path.write_text(Path(temporary, "compression_report.json").read_text(encoding="utf-8"))
        card = card_of(json.loads(path.read_text(encoding="utf-8")), preset)
        card.save(args.output / f"{name_of(preset)}.md")
        print(f"{preset}: {args.output / f'{name_of(preset)}.md'}", flush=True)


def presets_with_card() -> list[str]:
    return [preset for preset in PRESETS if preset not in WITHOUT_CARD]


def name_of(preset: str) -> str:
    return f"{MODEL.name}-{preset}-{KEEP:.0%}".rstrip("%")


def report_file(folder: Path, preset: str) -> Path:
    return folder / "reports" / f"{name_of(preset)}.json"


def card_of(report: dict[str, Any], preset: str) -> ModelCard:
    return model_card(report, repo_name=name_of(preset), base_license=local_licence(str(MODEL)))


def sources_of(preset: str) -> str:
    """A hash of what the recipe decides, and of model and texts: with others the report would be another.

    Fields that are as in every recipe are left out, so that a new one, which no preset uses, changes nothing.
    """
    defaults = Recipe().to_dict()
    decided = {k: v for k, v in recipe_from_preset(preset, keep=KEEP).to_dict().items() if v != defaults.get(k)}
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode())
    for path in (MODEL / "model.safetensors", MODEL / "tokenizer.json", *sorted(ASSETS.glob("*.jsonl"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def measured(preset: str) -> dict[str, Any]:
    """The report of one preset with its evaluation, without what a machine adds."""
    model = compress_moe(
        load_model(MODEL),
        recipe_from_preset(preset, keep=KEEP),
        calibration=str(ASSETS / "calibration.jsonl"),
        tokenizer=load_tokenizer(MODEL),
        num_samples=CALIBRATION_ROWS,
        sequence_length=ROW_TOKENS,
        progress=False,
    )
    report = model.compression_report.to_dict()
    rows, extras, baseline = judged_on()
    # The weights are those that are stored; a sum in float32 is faster on most CPUs, and the baseline's is one.
    scores, _ = evaluate_whole(model.float, rows, extras, baseline, progress=False)
    report["evaluation"] = scores.to_dict()
    return without_paths(without_machine(report)) | {"made_from_sha256": sources_of(preset)}


@functools.cache
def judged_on() -> tuple[Any, Extras, Any]:
    """Evaluation rows, prompts, and what the original makes of them: the same for all presets."""
    tokenizer = load_tokenizer(MODEL)
    rows = load_evaluation_data(
        str(ASSETS / "evaluation.jsonl"), tokenizer, num_samples=EVALUATION_ROWS, sequence_length=ROW_TOKENS
    )
    source = f"beginnings of rows of the evaluation text, at most {PROMPT_TOKENS} tokens"
    extras = Extras(tokenizer, prompts_from_rows(rows, PROMPTS), source)
    return rows, extras, beside(lambda: load_model(MODEL, dtype="float32"), extras, progress=False)


def without_machine(values: Any) -> Any:
    """A copy in which durations and memory are None."""
    if isinstance(values, dict):
        return {key: None if key in MACHINE_KEYS else without_machine(value) for key, value in values.items()}
    return [without_machine(value) for value in values] if isinstance(values, list) else values


if __name__ == "__main__":
    main()
