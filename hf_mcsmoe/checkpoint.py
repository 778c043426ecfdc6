"""Writing the result: checked before work starts, complete or not there at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .modeling.client_keys import add_client_keys
from .modeling.offload import offloaded_state_dict
from .publishing import write_card, write_pages, write_report
from .types import CompressionReport


def check_output_folder(output_dir: str | Path | None, overwrite: bool) -> Path | None:
    """The folder as a path.

    Raises:
        FileExistsError: It exists and is not empty, and `overwrite` is False.
        NotADirectoryError: It is a file.
    """
    if output_dir is None:
        return None
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir {str(folder)!r} is a file. Name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"output_dir {str(folder)!r} exists and is not empty. Choose another, or set overwrite=True (--overwrite)."
        )
    return folder


def check_free_space(folder: Path, needed: int) -> None:
    """Raise OSError if the disk of `folder` has less than `needed` bytes free."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"The result takes {needed:,} bytes, but the disk of {str(existing)!r} has {free:,} free. "
            "Free some space, keep fewer experts or choose another output_dir."
        )


def save_checkpoint(
    model: PreTrainedModel,
    report: CompressionReport,
    folder: Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write model, tokenizer, report, page, recipe and card into a temporary folder, then rename it to `folder`."""
    check_output_folder(folder, overwrite)
    with replacing(folder) as complete:
        model.save_pretrained(complete, state_dict=offloaded_state_dict(model))
        add_client_keys(complete, model.config, report.base_model)
        if tokenizer is not None:
            tokenizer.save_pretrained(complete)
        write_report(report, complete)
        write_pages(complete)
        write_card(complete, repo_name=folder.absolute().name)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write to; it takes the place of `folder` when the block ends without an error."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        complete = Path(temporary) / "new"
        complete.mkdir()
        yield complete
        if folder.exists():
            folder.rename(Path(temporary) / "old")  # removed together with the temporary folder
        complete.rename(folder)
