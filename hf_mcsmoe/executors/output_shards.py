"""Writing a checkpoint piece by piece: shards as save_pretrained would write them, the folder at the very end."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..modeling.client_keys import add_client_keys
from ..publishing import write_card, write_pages, write_report
from ..types import CompressionReport
from .skeleton import quiet


class OutputShards:
    """The unfinished checkpoint in a working folder: one shard a decoder layer and one for everything else.

    Without index and configuration, which come last, no library takes the folder for a model.

    Args:
        folder: Where the shards go; made if it does not exist.
        num_shards: How many there will be.
        original_format: Store tensors like the original checkpoint does (experts one by one), not like the model.
    """

    def __init__(self, folder: Path, num_shards: int, original_format: bool):
        self.folder = folder
        self.original_format = original_format
        self.num_shards = num_shards
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob("*.tmp"):
            unfinished.unlink()

    def write(self, number: int, model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write shard `number` (from 0) as save_pretrained would.

        Memory: the tensors, and copies of those whose conversion is reverted.

        Returns:
            Its "file", its "bytes", the "size" of its tensors in bytes and the names of the "tensors", as JSON.
        """
        ignored = set(model._keys_to_ignore_on_save or ())
        kept = {name: tensor.cpu() for name, tensor in tensors.items() if name not in ignored}
        kept = remove_tied_weights_from_state_dict(kept, model)
        if self.original_format:
            kept = revert_weight_conversion(model, kept)
        kept = {name: tensor.contiguous() for name, tensor in kept.items()}
        file = SAFE_WEIGHTS_NAME.replace(".safetensors", f"-{number + 1:05d}-of-{self.num_shards:05d}.safetensors")
        temporary = self.folder / f"{file}.tmp"
        try:
            save_file(kept, temporary, metadata={"format": "pt"})
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        except (SafetensorError, OSError):
            temporary.unlink(missing_ok=True)
            raise
        temporary.rename(self.folder / file)
        size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
        return {"file": file, "bytes": (self.folder / file).stat().st_size, "size": size, "tensors": sorted(kept)}

    def finish(self, model: PreTrainedModel, records: list[dict[str, Any]], num_parameters: int) -> None:
        """Add index, configuration, generation configuration and shim.

        Args:
            model: The compressed model, its weights on the meta device.
            records: What `write` gave for every shard.
            num_parameters: Of the result.
        """
        described = self.folder.parent / "described"
        shutil.rmtree(described, ignore_errors=True)
        with quiet():
            model.save_pretrained(described, state_dict={})
        for file in described.iterdir():
            if file.suffix != ".safetensors" and file.name != SAFE_WEIGHTS_INDEX_NAME:
                file.replace(self.folder / file.name)
        shutil.rmtree(described)
        add_client_keys(self.folder, model.config, model.config.name_or_path)
        weight_map = {name: record["file"] for record in records for name in record["tensors"]}
        metadata = {"total_parameters": num_parameters, "total_size": sum(record["size"] for record in records)}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index + "\n", encoding="utf-8")


def publish(complete: Path, output: Path, report: CompressionReport, tokenizer: Any) -> None:
    """Add tokenizer, report, page, recipe and card, then put the folder in the place of `output`."""
    if tokenizer is not None:
        tokenizer.save_pretrained(complete)
    write_report(report, complete)
    write_pages(complete)
    write_card(complete, repo_name=output.name)
    if output.exists():
        output.rename(complete.parent / "replaced")  # removed together with the working folder
    complete.rename(output)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
        isinstance(error, SafetensorError) and "os error 28" in str(error)
    )
