"""A merging operator of your own, without touching hf_mcsmoe: register a function, name it in the recipe. Seconds.

The operator here takes, for every weight, the value of the member with the largest magnitude there. The script
prints how much worse than the original the tiny model gets with it, and with M-SMoE's weighted average.

    python examples/your_own_merging_operator.py
"""

from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_mcsmoe
from hf_mcsmoe import compress_moe
from hf_mcsmoe.evaluation import evaluate_model, load_evaluation_data
from hf_mcsmoe.merging import MERGING
from hf_mcsmoe.recipe_reading import recipe_from_preset

ASSETS = Path(hf_mcsmoe.__file__).parent / "assets"
MODEL = ASSETS / "tiny-qwen3-moe"


@MERGING.register("largest_magnitude")
def merge_by_largest_magnitude(members: Tensor, importance: Tensor) -> Tensor:  # noqa: ARG001
    """Members (m, O, I), aligned to the first; importance (m,) is not used here. Returns (O, I)."""
    strongest = members.abs().argmax(dim=0, keepdim=True)
    return members.gather(0, strongest)[0]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = load_evaluation_data(ASSETS / "evaluation.jsonl", tokenizer, num_samples=16)
    original = AutoModelForCausalLM.from_pretrained(MODEL)
    for operator in ("weighted_average", "largest_magnitude"):
        model = AutoModelForCausalLM.from_pretrained(MODEL)
        recipe = recipe_from_preset("m-smoe", keep=0.75, merging=operator)
        compress_moe(model, recipe, calibration=ASSETS / "calibration.jsonl", tokenizer=tokenizer, num_samples=64)
        score = evaluate_model(model, rows, baseline=original, progress=False).overall
        print(f"{operator}: loss {score.baseline_loss:.3f} -> {score.loss:.3f} nats per token")


if __name__ == "__main__":
    main()
