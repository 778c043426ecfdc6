"""What decides the bytes of a streaming run's result, so that no other run goes on where it was."""

import hashlib
import json
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..outcome import package_version
from ..recipe import Recipe
from ..saved_statistics import SavedStatistics
from .shards import Shards


def fingerprint(
    model: PreTrainedModel,
    shards: Shards,
    recipe: Recipe,
    data: Calibration | SavedStatistics,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result, as JSON."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "hf_mcsmoe": package_version()}
    return {
        "versions": versions,
        "device": device.type,
        "dtype": str(model.config.dtype),
        "model": {"config": config, "shards": shards.fingerprint()},
        "recipe": recipe.to_dict(),
        "calibration": {**data.fingerprint(), **details_of(data)},
    }


def details_of(data: Calibration | SavedStatistics) -> dict[str, str]:
    """What the data's own fingerprint does not cover: padding and order of batches; files of saved statistics."""
    digest = hashlib.sha256()
    if isinstance(data, SavedStatistics):
        for file in sorted(data.folder.iterdir()):
            status = file.stat()
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
        return {"statistics": digest.hexdigest()}
    for batch in data.batches:
        digest.update(repr(tuple(batch.token_mask.shape)).encode())
        digest.update(batch.inputs["input_ids"].cpu().contiguous().numpy().tobytes())
    return {"batches": digest.hexdigest()}
