"""Commands that several processes run together, started by torchrun or accelerate launch."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

import typer


@contextmanager
def together() -> Iterator[None]:
    """Within the context the processes share the work; the first one says how many they are, and alone prints."""
    from transformers.utils import logging

    from ..executors.processes import working_together

    with working_together() as processes, ExitStack() as stack:
        if not processes.is_first:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
            logging.set_verbosity_error()
        elif not processes.is_alone:
            typer.echo(f"{processes.count} processes share the calibration batches and the layers.")
        yield
