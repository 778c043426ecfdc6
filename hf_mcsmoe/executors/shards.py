"""The safetensors files of a model: what they hold, from their headers alone, and their tensors a few at a time."""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class NotStreamableError(Exception):
    """The model is sound, but its layers cannot be run one at a time; the message says why."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies; `begin` and `end` are bytes from the start of its file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.begin


class Shards:
    """The weight files of one checkpoint. Memory: names, shapes and offsets; no weights.

    Args:
        path: Folder or Hub id. Files on the Hub are downloaded to its cache first.
        unpacking: Of a quantized checkpoint, see `unpacking_of_layers`; None for plain weights.

    Raises:
        NotStreamableError: There are weights, but not as safetensors.
        FileNotFoundError: No weights, or the index names a file that is not there.
        ValueError: A file is damaged or cut short, or the index names a tensor that no file holds.
    """

    def __init__(self, path: str | os.PathLike, unpacking: Any = None):
        files, weight_map = weight_files(path)
        self.unpacking = unpacking
        self.tensors: dict[str, StoredTensor] = {}
        self.headers: dict[str, dict[str, Any]] = {}
        for file in files:
            self._read_header(file)
        for name, file in weight_map.items():
            if name not in self.tensors or Path(self.tensors[name].file).name != file:
                raise ValueError(
                    f"{SAFE_WEIGHTS_INDEX_NAME} says that {name!r} is in {file!r}, but it is not. "
                    "The index belongs to other shards, or the shard is damaged; download the model again."
                )

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(file, framework="pt") as opened:  # checks that header and data fit together
                opened.keys()
            with open(file, "rb") as raw:
                length = struct.unpack("<Q", raw.read(8))[0]
                header = raw.read(length)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"The shard {file!r} is missing. Download the model again.") from error
        except SafetensorError as error:
            raise ValueError(
                f"The shard {file!r} is damaged or cut short ({error}). Download that file again."
            ) from error
        status = os.stat(file)
        self.headers[Path(file).name] = {
            "size": status.st_size,
            "modified": status.st_mtime_ns,
            "header": hashlib.sha256(header).hexdigest(),
        }
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                self.tensors[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), begin, end)

    def fingerprint(self) -> dict[str, Any]:
        """Size, time of the last change and hash of the header of each file, as JSON."""
        return self.headers

    def on_meta(self) -> dict[str, Tensor]:
        """Every tensor without its data.

        Raises:
            ValueError: A dtype that this package cannot read.
        """
        known = FLOATING | OTHER_DTYPES
        for name, stored in self.tensors.items():
            if stored.dtype not in known:
                raise ValueError(
                    f"{name!r} is stored as {stored.dtype}, which cannot be read here. Convert the model to bfloat16."
                )
        return {
            name: torch.empty(stored.shape, dtype=known[stored.dtype], device="meta")
            for name, stored in self.tensors.items()
        }

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Memory-mapped slices of some tensors, by name; only the files that hold them are open.

        Raises:
            ValueError: A file changed since its header was read.
        """
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            slices = {}
            for name in names:
                file = self.tensors[name].file
                if file not in handles:
                    self._check_unchanged(file)
                    handles[file] = stack.enter_context(safe_open(file, framework="pt"))
                slices[name] = handles[file].get_slice(name)
            yield slices

    def _check_unchanged(self, file: str) -> None:
        status, known = os.stat(file), self.headers[Path(file).name]
        if (status.st_size, status.st_mtime_ns) != (known["size"], known["modified"]):
            raise ValueError(
                f"The shard {file!r} was changed while the model was being compressed. "
                "Restore it and run the same command again, or start afresh with a finished model."
            )

    def num_bytes(self, names: Iterable[str]) -> int:
        """Bytes on disk of some tensors."""
        return sum(self.tensors[name].num_bytes for name in names)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors by name, on the CPU, in memory of their own.

        Raises:
            ValueError: A file changed since its header was read.
        """
        names = list(names)
        with self.opened(names) as slices:
            # A slice of nothing less than all of it; a number has no axes to slice.
            return {name: slices[name][...] for name in names}


def weight_files(path: str | os.PathLike) -> tuple[list[str], dict[str, str]]:
    """(safetensors files of a model, file of each tensor by the index), the latter empty for a single file."""
    local = Path(path).expanduser()
    path = local if local.exists() else str(path)

    def find(name: str) -> str | None:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False)

    single = find(SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single], {}
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        if any(find(name) is not None for name in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
            raise NotStreamableError("its weights are no safetensors files")
        raise FileNotFoundError(f"{str(path)!r} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}.")
    try:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index!r} is no index of shards: {error}. Download that file again.") from error
    if isinstance(path, Path):
        return [str(path / file) for file in sorted(set(weight_map.values()))], weight_map
    return get_checkpoint_shard_files(path, index)[0], weight_map
