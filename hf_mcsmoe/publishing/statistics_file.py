"""The arrays beside the report: how often each expert was chosen, and how alike the experts of a layer are."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# In a folder of its own: vLLM and others load every *.safetensors that lies beside the weights.
STATISTICS_FILE = "statistics/compression_statistics.safetensors"
# One entry only: safetensors writes several in any order, and the file would differ from run to run.
METADATA = {"format_version": "1"}


def write_statistics(statistics: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write the arrays of a report into the folder of a checkpoint; nothing if there are none.

    Equal arrays give equal bytes. It is safetensors and not part of the JSON because 48 layers of 128 experts have
    786,432 similarities: 3.1 MB here, 15 MB there.

    Args:
        statistics: See `layer.record.record_statistics`.
        folder: Of the checkpoint; it exists.
    """
    if statistics:
        path = Path(folder) / STATISTICS_FILE
        path.parent.mkdir(exist_ok=True)
        save_file(dict(statistics), path, metadata=METADATA)


def read_statistics(folder: str | Path) -> dict[str, Tensor]:
    """The arrays beside a report, by name; none where there is no file: an older report, or one that was moved.

    Raises:
        ValueError: The file is damaged.
    """
    path = Path(folder) / STATISTICS_FILE
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged or cut off: {error}. Delete it, or compress again.") from error
