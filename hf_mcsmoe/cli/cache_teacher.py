"""`hf-mcsmoe cache-teacher`: compute the logits of a teacher once."""

from pathlib import Path
from typing import Annotated

import typer

from ..cli import options
from .recover import Data
from .tables import human_bytes


def cache_teacher_command(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", help="File for the logits, ending in .safetensors.")],
    data: Data = None,
    top_k: Annotated[int, typer.Option("--top-k", help="Logits to keep of each token; the others as one sum.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="That of the recovery.")] = 2.0,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = 8,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Store the top-k logits of a model for exactly the rows that `recover` with the same data options trains with.

    Call it again after an interruption: it goes on.

    Example: hf-mcsmoe cache-teacher Qwen/Qwen3-30B-A3B --data texts.jsonl --output teacher.safetensors
    """
    from ..loading import load_model, load_tokenizer, read_config
    from ..training import cache_teacher
    from ..training.recovery import checkpoint_task
    from ..training.recovery_data import RowCollator, load_recovery_data

    task, tokenizer = checkpoint_task(model), load_tokenizer(model)
    limits = {"num_samples": num_samples, "sequence_length": sequence_length}
    vocab_size = read_config(model).get_text_config().vocab_size
    rows = load_recovery_data(data, tokenizer, task, vocab_size=vocab_size, **limits)
    cache_teacher(
        load_model(model, dtype=dtype, device_map=device_map),
        [*rows.train, *rows.held_out],
        output,
        top_k=top_k,
        temperature=temperature,
        batch_size=batch_size,
        data_collator=RowCollator(getattr(tokenizer, "pad_token_id", None) or 0, task),
        overwrite=overwrite,
    )
    typer.echo(f"Written to {output}: {human_bytes(output.stat().st_size)}. To use it:")
    typer.echo(f"    hf-mcsmoe recover DIR --teacher {output} --output OUTPUT, and --data as here")
