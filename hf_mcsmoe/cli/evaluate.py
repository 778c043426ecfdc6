"""`hf-mcsmoe evaluate`: how much a compressed model differs from its original."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cli import options
from .evaluation_tables import show

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..evaluation import Evaluation
    from ..evaluation.run import Baseline, Extras, Measured

DEFAULT_GENERATIONS = 16  # beside a baseline


def evaluate_command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of the model to evaluate.")],
    baseline: Annotated[str | None, typer.Option("--baseline", help="Model to compare with: the original.")] = None,
    baseline_cache: Annotated[
        Path | None,
        typer.Option(
            "--baseline-cache",
            help="File for the logits of the baseline, .safetensors: then only one model is in memory at a time. "
            "Made if it does not exist; with it --baseline is not needed any more.",
        ),
    ] = None,
    data: options.Data = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = 8,
    generations: Annotated[
        int | None,
        typer.Option(
            "--generations",
            help="Beginnings of rows that the models continue, to look for loops; default "
            f"{DEFAULT_GENERATIONS} with a baseline, else 0.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Continue this instead, and show it; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens to write.")] = 64,
    lm_eval: Annotated[
        list[str] | None, typer.Option("--lm-eval", help="Tasks of lm-eval, separated by commas; repeatable.")
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option("--lm-eval-include", help="Folder with more tasks of lm-eval (YAML files).")
    ] = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    save: Annotated[bool, typer.Option("--save", help="Add the scores to the report and the card in DIR.")] = False,
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure perplexity per domain and, with --baseline, how far predictions moved and whether the model loops.

    Example: hf-mcsmoe evaluate out --baseline Qwen/Qwen3-30B-A3B --data held_out.jsonl --save
    """
    from ..evaluation.harness import check_tasks
    from ..evaluation.run import evaluate_whole
    from ..loading import load_model, load_tokenizer, read_config

    if save:
        from ..publishing import read_report

        read_report(folder)  # there must be one, before the models run
    tasks = [task.strip() for given in lm_eval or [] for task in given.split(",") if task.strip()]
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    vocab_size = read_config(folder, **loading).get_text_config().vocab_size
    tokenizer = load_tokenizer(folder, **loading)
    if tokenizer is None and baseline is not None:
        tokenizer = load_tokenizer(baseline, **loading)
    for option, given in (("--prompt", prompt), ("--lm-eval", tasks)):
        if given and tokenizer is None:
            raise ValueError(
                f"{option} needs a tokenizer, but {folder!r} has none. Save one there, or leave {option} out."
            )
    if tasks:
        check_tasks(tasks, lm_eval_include)
    limits = {"num_samples": num_samples, "sequence_length": sequence_length, "batch_size": batch_size}
    rows = read_data(data, tokenizer, vocab_size=vocab_size, **limits)
    if generations is None:
        generations = DEFAULT_GENERATIONS if baseline or baseline_cache else 0
    how = {"max_new_tokens": max_new_tokens, "tasks": tasks, "include": lm_eval_include, "batch_size": batch_size}
    extras = choose_extras(rows, tokenizer, prompt or [], generations, **how)
    load = partial(load_model, dtype=dtype, device_map=device_map, **loading)
    compared = open_baseline(baseline, baseline_cache, load, rows, extras)
    scores, measured = evaluate_whole(partial(load, folder), rows, extras, compared)
    if save:
        save_scores(folder, scores)
    samples = samples_of(prompt or [], tokenizer, measured, compared)
    if as_json:
        values = {"model": folder, **scores.to_dict(), "samples": samples}
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


def choose_extras(
    rows: "dict[str, Calibration]", tokenizer: Any, texts: list[str], generations: int, **how: Any
) -> "Extras":
    """What is measured besides the loss: texts as prompts, or the beginnings of some rows.

    Raises:
        ValueError: A negative number, or a prompt without a token.
    """
    from ..evaluation.generation import PROMPT_TOKENS, encode_prompts, prompts_from_rows
    from ..evaluation.run import Extras

    if generations < 0 or how["max_new_tokens"] < 1:
        raise ValueError(
            f"--generations is {generations} and --max-new-tokens {how['max_new_tokens']}, they must be at least 0 "
            "and 1. Use --generations 0 to write nothing."
        )
    if texts:
        return Extras(tokenizer, encode_prompts(texts, tokenizer), "texts of the user", **how)
    source = f"beginnings of rows of the evaluation text, at most {PROMPT_TOKENS} tokens"
    return Extras(tokenizer, prompts_from_rows(rows, generations), source, **how)


def open_baseline(
    baseline: str | None, cache: Path | None, load: Any, rows: "dict[str, Calibration]", extras: "Extras"
) -> "Baseline | None":
    """What the options say to compare with.

    Raises:
        ValueError: The file is of another model than `baseline`, or does not fit the rows.
    """
    from ..evaluation.run import beside, one_at_a_time

    if cache is None:
        return None if baseline is None else beside(partial(load, baseline), extras)
    loader = None if baseline is None else partial(load, baseline)
    if baseline is not None and cache.exists():
        from ..training import CachedTeacher

        teacher = CachedTeacher(cache).description.teacher
        if Path(teacher).name != Path(baseline).name:  # the same folder may be given in two ways
            raise ValueError(
                f"--baseline-cache {str(cache)!r} is of {teacher!r}, not of {baseline!r}. Name another file."
            )
    return one_at_a_time(loader, cache, rows, extras)


def samples_of(
    texts: list[str], tokenizer: Any, measured: "Measured", baseline: "Baseline | None"
) -> list[dict[str, str]]:
    """For each prompt that the user gave, what the models wrote after it."""
    written = {"model": measured.written, "baseline": None if baseline is None else baseline.measured.written}
    return [
        {
            "prompt": text,
            **{
                name: tokenizer.decode(rows[place], skip_special_tokens=True)
                for name, rows in written.items()
                if rows is not None
            },
        }
        for place, text in enumerate(texts)
    ]


def save_scores(folder: str, scores: "Evaluation") -> None:
    """Add scores to the report, its page and the model card in a folder."""
    from ..publishing import read_report, write_card, write_pages, write_report

    write_report(read_report(folder), folder, scores)
    write_pages(folder)
    write_card(folder, repo_name=Path(folder).resolve().name)
