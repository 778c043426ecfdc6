"""calibrate_moe: run the calibration data once, and keep what any number of compressions need."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .calibration import Calibration, load_calibration
from .checkpoint import check_output_folder, replacing
from .compress import as_recipe, check_model, check_same
from .config import MergedSparseMoeConfig
from .executors.in_memory import Collected
from .executors.kept_inputs import collect_first, visits
from .executors.processes import current, device_map_of, in_all_processes
from .executors.wanted import Wanted, wanted_by_all
from .families import find_layers, reading_part, tied_layers
from .fitting import resolve_fit
from .loading import empty_model, load_model, load_tokenizer, read_config
from .recipe import Recipe
from .saved_statistics import SavedStatistics, fingerprint_of, write_header, write_layer
from .types import MoeLayer


@in_all_processes
def calibrate_moe(
    model: PreTrainedModel | str | Path,
    recipes: Sequence[MergedSparseMoeConfig | Recipe | str | Path],
    output_dir: str | Path,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    num_samples: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    progress: bool = True,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> SavedStatistics:
    """Collect once what several recipes need of a model, at any ratio: `compress_moe(..., calibration=output_dir)`.

    One forward over the calibration data; more where recipes fit layers on kept tokens and those of all layers do not
    fit in memory. What a sequential recipe needs is collected of the original model, for its one-shot form.

    Several processes share the calibration batches as they do in `compress_moe`; the first one writes.

    Args:
        model: A model, or a folder or Hub id to load. It is not changed.
        recipes: Requests, presets, recipes or paths of YAML recipes; their `keep` does not matter.
        output_dir: A new folder. It is written beside it first and renamed when complete.
        calibration: As for `compress_moe`.
        tokenizer: As for `compress_moe`.
        num_samples: As for `compress_moe`.
        sequence_length: As for `compress_moe`.
        batch_size: As for `compress_moe`.
        overwrite: Replace a folder that is not empty.
        progress: Show progress bars.
        dtype: For loading a path, as in `from_pretrained`.
        device_map: For loading a path, as in `from_pretrained`.
        trust_remote_code: For loading a path, as in `from_pretrained`.

    Returns:
        What was written. On disk: the statistics of each layer, and D + k numbers for each token that is kept, 2 D + k
        where the router is called with hidden states.

    Raises:
        ValueError: A recipe that the model cannot have, or recipes that draw their tokens in different ways.
        FileExistsError: `output_dir` is not empty.
    """
    processes = current()
    progress = progress and processes.is_first
    requests = [as_recipe(recipe) for recipe in recipes]
    wanted = wanted_by_all(requests)
    output = check_output_folder(output_dir, overwrite)
    described = model
    if not isinstance(model, PreTrainedModel):
        described = empty_model(
            read_config(model, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
        )
        tokenizer = tokenizer or load_tokenizer(model, trust_remote_code=trust_remote_code)
    requests = [resolve_fit(described, request, dtype=dtype)[0] for request in requests]
    for request in requests:
        check_model(described, request)
    data = load_calibration(
        calibration,
        tokenizer,
        num_samples=num_samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=wanted.seed,
        vocab_size=reading_part(described).get_input_embeddings().num_embeddings,
    )
    check_same(processes, requests, data, described)
    if not isinstance(model, PreTrainedModel):
        device_map = device_map_of(processes, device_map)
        model = load_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
    found = find_layers(model)
    first_of_tied = tied_layers(found)
    layers = [layer for layer in found if layer.name not in first_of_tied]
    tied = {layer: first_of_tied[layer.name] for layer in found if layer.name in first_of_tied}
    collected = collect_first(model, layers, tied, data, wanted, progress)
    todo = visits(model, layers, tied, data, wanted, collected)
    todo = tqdm(todo, "writing", len(layers), disable=not progress)
    if processes.is_first:
        write(output, wanted, model, data, [layer.name for layer in layers], todo)
    else:
        for _ in todo:  # its part of the forwards
            pass
    processes.agree()  # the folder is complete
    return SavedStatistics(output)


def write(
    output: Path,
    wanted: Wanted,
    model: PreTrainedModel,
    data: Calibration,
    names: list[str],
    todo: Iterable[tuple[MoeLayer, Collected]],
) -> None:
    """Write the folder: what `todo` gives of the layers `names`, in any order, then the header."""
    with replacing(output) as folder:
        entries = {}
        for layer, of_layer in todo:
            entries[layer.name] = write_layer(folder, names.index(layer.name), of_layer)
        of_layers = [entries[name] for name in names]
        write_header(folder, wanted, fingerprint_of(model), data.fingerprint(), names, of_layers)
