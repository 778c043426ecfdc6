"""`hf-mcsmoe evaluate`: how much a compressed model differs from its original."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .tables import print_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration import Calibration
    from ..evaluation import Evaluation


def evaluate_command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of the model to evaluate.")],
    baseline: Annotated[str | None, typer.Option("--baseline", help="Model to compare with: the original.")] = None,
    data: options.Data = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = 8,
    prompt: options.Prompt = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to write.")] = 48,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    save: Annotated[bool, typer.Option("--save", help="Add the scores to the report and the card in DIR.")] = False,
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure perplexity per domain and, with --baseline, how often and how far predictions differ.

    Example: hf-mcsmoe evaluate out --baseline Qwen/Qwen3-30B-A3B --data held_out.jsonl --prompt "The capital of"
    """
    from ..evaluation import evaluate_model
    from ..loading import load_model, load_tokenizer, read_config

    if save:
        from ..publishing import read_report

        read_report(folder)  # there must be one, before the models run
    loading = {"trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(folder, **loading)
    if tokenizer is None and baseline is not None:
        tokenizer = load_tokenizer(baseline, **loading)
    if prompt and tokenizer is None:
        raise ValueError(
            f"--prompt needs a tokenizer, but {folder!r} has none. Save one there, or leave --prompt out."
        )
    vocab_size = read_config(folder, **loading).get_text_config().vocab_size
    limits = {"num_samples": num_samples, "sequence_length": sequence_length, "batch_size": batch_size}
    rows = read_data(data, tokenizer, vocab_size=vocab_size, **limits)
    model = load_model(folder, dtype=dtype, device_map=device_map, **loading)
    original = load_model(baseline, dtype=dtype, device_map=device_map, **loading) if baseline is not None else None
    scores = evaluate_model(model, rows, baseline=original)
    samples = samples_of({"model": model, "baseline": original}, tokenizer, prompt or [], max_new_tokens)
    if save:
        save_scores(folder, scores)
    if as_json:
        values = {"model": folder, "baseline": baseline, **scores.to_dict(), "samples": samples}
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    show(scores)
    for sample in samples:
        typer.echo("\n".join(f"{name}: {text!r}" for name, text in sample.items()))


def read_data(files: list[str] | None, tokenizer: Any, **options: Any) -> "dict[str, Calibration]":
    """Evaluation rows by domain from all files.

    Raises:
        ValueError: Two files give the same domain, or one cannot be read.
    """
    from ..evaluation import load_evaluation_data

    rows: dict[str, Calibration] = {}
    for file in files or [None]:
        for name, domain in load_evaluation_data(file, tokenizer, **options).items():
            if name in rows:
                raise ValueError(f"Two files of --data give the domain {name!r}. Rename one of them.")
            rows[name] = domain
    return rows


def samples_of(
    models: "dict[str, PreTrainedModel | None]", tokenizer: Any, prompts: list[str], max_new_tokens: int
) -> list[dict[str, str]]:
    """For each prompt, what the models that exist write after it, by their names."""
    from ..evaluation import generate_samples

    if not prompts:  # there may be no tokenizer
        return []
    written = {
        name: generate_samples(m, tokenizer, prompts, max_new_tokens) for name, m in models.items() if m is not None
    }
    return [
        {"prompt": prompt, **{name: texts[position] for name, texts in written.items()}}
        for position, prompt in enumerate(prompts)
    ]


def save_scores(folder: str, scores: "Evaluation") -> None:
    """Add scores to the report, its page and the model card in a folder."""
    from pathlib import Path

    from ..publishing import read_report, write_card, write_pages, write_report

    write_report(read_report(folder), folder, scores)
    write_pages(folder)
    write_card(folder, repo_name=Path(folder).resolve().name)


def show(scores: "Evaluation") -> None:
    """Print scores for people."""
    columns = ["domain", "tokens", "perplexity"]
    has_baseline = scores.overall.kl is not None
    if has_baseline:
        columns += ["baseline", "KL (nats)", "same top token"]
    rows = []
    for name, score in [*scores.domains.items(), ("all", scores.overall)]:
        row = [name, f"{score.tokens:,}", f"{score.perplexity:.2f}"]
        if has_baseline:
            row += [f"{perplexity_of(score.baseline_loss):.2f}", f"{score.kl:.4f}", f"{score.top1_agreement:.1%}"]
        rows.append(row)
    print_table("Evaluation", columns, rows)


def perplexity_of(loss: float) -> float:
    """`exp(loss)`, at most the largest power that a float holds."""
    import math

    return math.exp(min(loss, 700.0))
