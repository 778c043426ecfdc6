"""`hf-mcsmoe demo`: the whole way on a tiny model that ships, offline."""

import shlex
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cli import options
from .compress import bytes_of_weights
from .tables import before_after, human, print_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..evaluation import Evaluation

PROMPT = "def read_file(path):\n"
CALIBRATION_ROWS, CALIBRATION_LENGTH = 64, 256
EVALUATION_ROWS = 16  # of 256 tokens, for each domain
GENERATIONS, GENERATED_TOKENS = 16, 48
MERGING = options.DEFAULT_PRESET
SELECTION = {"mapped": "joint-obs", "native": "narrow-obs"}  # what loses least without training, by layout


def demo_command(
    output: options.Output = Path("hf-mcsmoe-demo"),
    keep: Annotated[float, typer.Option("--keep", help="Share of the experts that stays, in (0, 1].")] = 0.5,
    layout: Annotated[str, typer.Option("--layout", help="mapped or native.")] = "mapped",
    overwrite: options.Overwrite = False,
    push_to: Annotated[
        str | None, typer.Option("--push-to", help="Upload the result to this repository, owner/name.")
    ] = None,
) -> None:
    """Compress the tiny model that ships with this package in two ways, and compare them. Offline, one minute.

    Example: hf-mcsmoe demo --keep 0.25 --output out
    """
    start = time.perf_counter()
    merging = options.build_recipe(preset=MERGING, keep=keep, layout=layout)
    selection = options.build_recipe(preset=SELECTION[layout], keep=keep)
    from transformers import AutoModelForCausalLM

    from ..checkpoint import check_output_folder
    from ..compress import compress_moe
    from ..loading import load_model, load_tokenizer
    from ..publishing.hub import check_destination

    check_output_folder(output, overwrite)
    if push_to is not None:
        check_destination(push_to)
    source = tiny_model_folder()
    # Compared in float32, which most CPUs compute faster than the bfloat16 that is stored.
    original, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
    data = {"calibration": str(source.parent / "calibration.jsonl"), "num_samples": CALIBRATION_ROWS}
    data["sequence_length"] = CALIBRATION_LENGTH
    step(
        1,
        f"The original: {type(original).__name__} with {human(original.num_parameters())} parameters, trained on "
        "Python source code and its documentation. Most of it are experts, of which a token uses a few.",
    )
    step(
        2,
        f"Compress with {MERGING} to {keep:.0%} of the experts: run calibration text, count how often the router "
        "picks each expert, and merge the seldom used ones into the most similar often used one.",
    )
    merged = compress_moe(load_model(source, dtype="float32"), merging, tokenizer=tokenizer, **data)
    step(
        3,
        f"Compress with {selection.preset} to the same size: keep the neurons of the experts that cannot be replaced "
        "by others, then fit what is left to the output of the original layer. Write the result.",
    )
    compress_moe(source, selection, output_dir=output, overwrite=overwrite, **data)
    step(4, f"Load it from {output} with AutoModelForCausalLM, as any model.")
    selected = AutoModelForCausalLM.from_pretrained(output, dtype="float32")
    show_sizes(original, selected, source, output)
    compare(original, {MERGING: merged, selection.preset: selected}, tokenizer, source, output)
    if push_to is not None:
        publish(output, push_to)
    typer.echo(f"\nDone in {time.perf_counter() - start:.0f} s. {written_files(output)}")
    show_next(source, output)


def compare(
    original: "PreTrainedModel", results: "dict[str, PreTrainedModel]", tokenizer: Any, source: Path, output: Path
) -> None:
    """Measure all models on held-out text and let them write; the last one's scores go into its report and card."""
    from ..evaluation import load_evaluation_data
    from ..evaluation.generation import encode_prompts, prompts_from_rows
    from ..evaluation.run import Extras, beside, evaluate_whole
    from .evaluate import save_scores

    step(
        5,
        f"Compare both with the original on text that it was not trained on, {EVALUATION_ROWS} rows of each domain. "
        "Perplexity: how many tokens the model hesitates between, lower is better. KL: how far predictions moved, 0 "
        "is not at all. Repeated: the share of four tokens in a row that a text had before, as loops do.",
    )
    rows = load_evaluation_data(str(source.parent / "evaluation.jsonl"), tokenizer, num_samples=EVALUATION_ROWS)
    prompts = [*prompts_from_rows(rows, GENERATIONS), *encode_prompts([PROMPT], tokenizer)]
    extras = Extras(tokenizer, prompts, "beginnings of rows and the start of a function", GENERATED_TOKENS)
    baseline = beside(lambda: original, extras)
    written = {"original": baseline.measured.written}
    scores_of: dict[str, Evaluation] = {}
    for name, model in results.items():
        scores_of[name], measured = evaluate_whole(partial(_itself, model), rows, extras, baseline)
        written[name] = measured.written
    show_comparison(scores_of)
    save_scores(str(output), list(scores_of.values())[-1])
    step(6, f"What each writes after {PROMPT!r}, always with the most likely token:")
    for name, texts in written.items():
        typer.echo(f"   {name}: {tokenizer.decode(texts[-1], skip_special_tokens=True)!r}")


def show_comparison(scores_of: "dict[str, Evaluation]") -> None:
    """Print a row for the original and one for each result: scores of all domains together."""
    from .evaluation_tables import cell, estimate

    first = next(iter(scores_of.values()))
    base = estimate(first.generation.repetition.baseline, "{:.1%}")
    rows = [["original", f"{first.overall.baseline_perplexity:.2f}", "", "", base]]
    for name, scores in scores_of.items():
        score = scores.overall
        rows.append(
            [
                name,
                cell(score.perplexity, score.perplexity_interval, "{:.2f}"),
                cell(score.kl, score.kl_interval, "{:.4f}"),
                cell(score.top1_agreement, score.top1_agreement_interval, "{:.1%}"),
                estimate(scores.generation.repetition.value, "{:.1%}"),
            ]
        )
    print_table("Comparison", ["", "perplexity", "KL (nats)", "same top token", "repeated"], rows)
    typer.echo(f"In brackets: {first.confidence:.0%} confidence intervals. The model card has the domains one by one.")


def _itself(model: "PreTrainedModel") -> "PreTrainedModel":
    return model


def written_files(output: Path) -> str:
    """Where the files for people are."""
    names = {"Model card": "README.md", "report to look at": "compression_report.html"}
    return ", ".join(f"{label}: {output / name}" for label, name in names.items() if (output / name).is_file())


def publish(output: Path, repo_id: str) -> None:
    """Upload the result, and say how to load it from there."""
    from ..publishing import push_checkpoint
    from .push import show_commit, show_files

    step(7, f"Upload everything to {repo_id} in one commit.")
    show_files(output, repo_id)
    show_commit(push_checkpoint(output, repo_id), create_pr=False)


def tiny_model_folder() -> Path:
    """The folder of the tiny model.

    Raises:
        FileNotFoundError: The package was installed without its assets.
    """
    folder = Path(__file__).parents[1] / "assets" / "tiny-qwen3-moe"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The tiny model is not in {str(folder)!r}. Reinstall hf-mcsmoe, or make it: "
            "python examples/train_tiny_moe.py --output hf_mcsmoe/assets"
        )
    return folder


def step(number: int, text: str) -> None:
    """Say what happens next."""
    typer.echo(f"\n{number}. {text}")


def show_sizes(original: "PreTrainedModel", compressed: "PreTrainedModel", source: Path, output: Path) -> None:
    """Print parameters and bytes of both models."""
    numbers = original.num_parameters(), compressed.num_parameters()
    before, after = bytes_of_weights(source), bytes_of_weights(output)
    rows = [
        before_after("parameters", *numbers),
        ["bytes on disk", f"{before:,}", f"{after:,}", f"{after / before:.1%}"],
    ]
    print_table("Size", ["", "original", "compressed", "left"], rows)


def show_next(source: Path, output: Path) -> None:
    """Print what to try next."""
    result, original = shlex.quote(str(output)), shlex.quote(str(source))
    typer.echo("Next, try:")
    typer.echo(f"  hf-mcsmoe inspect {result}")
    typer.echo(f"  hf-mcsmoe plan {original} --keep 0.25 --layout native")
    typer.echo(f"  hf-mcsmoe evaluate {result} --baseline {original}")
    typer.echo("  hf-mcsmoe compress YOUR_MODEL --output out --keep 0.5 --calibration your_texts.jsonl")
