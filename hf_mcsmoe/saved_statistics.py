"""What calibration left, in a folder: calibrate once, compress many times. Safetensors and JSON only."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .auto_candidates import AUTO
from .executors.in_memory import Collected
from .executors.journal import compare
from .executors.wanted import DRAWS, Wanted, wanted_by
from .families import find_layers
from .modeling.offload import execution_device, fetched
from .observation.layer_inputs import LayerInputs, TensorOfBlock
from .recipe import Recipe
from .types import LayerStatistics, MoeLayer

HEADER_FILE = "statistics.json"
FORMAT_VERSION = 1
PLAIN = (bool, int, float, str, type(None))


class OtherModelError(ValueError):
    """Saved statistics are not of the model that they are to be used for."""


class SavedStatistics(Mapping[str, Collected]):
    """A folder that `calibrate` wrote. As a mapping: what calibration left of each layer, read when it is asked for.

    Args:
        folder: With `statistics.json`.

    Raises:
        FileNotFoundError: It has none.
        ValueError: It is of a newer format.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / HEADER_FILE
        if not path.is_file():
            raise FileNotFoundError(f"There is no {str(path)!r}. Make it with `hf-mcsmoe calibrate`.")
        self.header = json.loads(path.read_text(encoding="utf-8"))
        if self.header["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{str(path)!r} has format_version {self.header['format_version']}, this hf_mcsmoe reads up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade hf-mcsmoe"
            )
        self.layers: list[str] = self.header["layers"]
        self.devices: dict[str, torch.device] = {}  # where the layers of a model compute, after `check_model`

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: str) -> Collected:
        place = self.layers.index(layer)
        return read_layer(self.folder, place, self._entry(place), self.devices.get(layer, torch.device("cpu")))

    def statistics(self) -> dict[str, LayerStatistics]:
        """The statistics of the layers that a calibration token reached, without their tokens."""
        found = {layer: self.statistics_of(layer) for layer in self.layers}
        return {layer: statistics for layer, statistics in found.items() if statistics is not None}

    def statistics_of(self, layer: str) -> LayerStatistics | None:
        """The statistics of one layer, without its tokens; None if no calibration token reached it."""
        place = self.layers.index(layer)
        return read_statistics(self.folder, place, self._entry(place))

    def _entry(self, place: int) -> dict[str, Any]:
        return {name: self.header[name][place] for name in ("num_tokens", "tokens")}

    def fingerprint(self) -> dict[str, Any]:
        """What was calibrated on, as `Calibration.fingerprint` says it."""
        return self.header["calibration"]

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse a recipe that needs what is not here.

        Raises:
            ValueError: Its statistics, its tokens or their number are not here, or each layer's must come from the
                layers before it.
        """
        wanted, saved = wanted_by(recipe), self.header["wanted"]
        where = f"The statistics in {str(self.folder)!r}"
        if recipe.preset == AUTO:
            raise ValueError(
                f"The preset {AUTO!r} compares recipes on held-out text, which saved statistics do not hold. "
                "Give the calibration data itself, or name another preset."
            )
        if wanted.sequential:
            raise ValueError(
                f"{where} are of the original model, but the recipe is sequential. "
                "Set sequential=False, or give the calibration data itself."
            )
        of_gradients = recipe.statistics_with("gradients")
        missing = sorted(wanted.statistics - {"selection_count"} - set(saved["statistics"]))
        if missing or (wanted.keeps_tokens and not saved["keeps_tokens"]):
            lacking = [*missing, *(["kept tokens"] if wanted.keeps_tokens and not saved["keeps_tokens"] else [])]
            raise ValueError(
                f"{where} lack {lacking}, which {recipe.preset or 'the recipe'} needs. "
                "Calibrate again and name it: hf-mcsmoe calibrate MODEL --for ..."
            )
        for name in DRAWS:
            # Folders of before there was a choice say nothing of `gradient_tokens`: all tokens ran backward.
            if getattr(wanted, name) != saved.get(name) and (name != "gradient_tokens" or of_gradients):
                raise ValueError(
                    f"{where} were made with {name} {saved.get(name)}, the recipe has {getattr(wanted, name)}. "
                    "Make them equal, or calibrate again."
                )

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse another model than the one that was calibrated.

        Raises:
            OtherModelError: Its configuration or weights differ.
        """
        self._refuse(compare(self.header["model"], json.loads(json.dumps(fingerprint_of(model)))))
        self.devices = {layer.name: execution_device(layer.experts) for layer in find_layers(model)}

    def check_configuration(self, model: PreTrainedModel) -> None:
        """The part of `check_model` that no weights are needed for; `check_layer` is the other.

        Raises:
            OtherModelError: The configuration or the names of the MoE layers differ.
        """
        names = {"layers": sorted(layer.name for layer in find_layers(model))}
        saved = {"config": self.header["model"]["config"], "layers": sorted(self.header["model"]["layers"])}
        self._refuse(compare(saved, json.loads(json.dumps({"config": configuration_of(model), **names}))))

    def check_layer(self, layer: MoeLayer) -> None:
        """Refuse a layer, with its weights, that is not what was calibrated.

        Raises:
            OtherModelError: Its router or its experts differ.
        """
        saved = self.header["model"]["layers"][layer.name]
        self._refuse(compare({"layers": {layer.name: saved}}, {"layers": {layer.name: hash_of(layer)}}))

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            raise OtherModelError(
                f"The statistics in {str(self.folder)!r} are of another model: {'; '.join(differences[:4])}. "
                "Calibrate this one."
            )


def open_statistics(calibration: Any) -> SavedStatistics | None:
    """The saved statistics that a user means by `calibration`; None where it is anything else."""
    if isinstance(calibration, SavedStatistics):
        return calibration
    if isinstance(calibration, str | Path) and (Path(calibration) / HEADER_FILE).is_file():
        return SavedStatistics(calibration)
    return None


def write_layer(folder: Path, place: int, collected: Collected) -> dict[str, Any]:
    """Write what calibration left of one layer; returns what the header says of it.

    Raises:
        ValueError: The router of the layer is called with something that cannot be written.
    """
    statistics = collected.statistics
    if statistics is not None:
        sums = {"selection_count": statistics.selection_count, **statistics.sums}
        save_file({name: t.contiguous() for name, t in sums.items()}, folder / file_of("statistics", place))
    tensors: dict[str, Tensor] = {}
    tokens = {part: describe(getattr(collected, part), tensors, part, place) for part in ("held_out", "calibration")}
    save_file(tensors, folder / file_of("tokens", place))
    return {"num_tokens": statistics.num_tokens if statistics is not None else None, "tokens": tokens}


def read_layer(folder: Path, place: int, entry: dict[str, Any], device: torch.device) -> Collected:
    """What `write_layer` wrote, its tokens on `device`; `entry` is what it returned."""
    tensors = {name: tensor.to(device) for name, tensor in load_file(folder / file_of("tokens", place)).items()}
    held_out, calibration = (inputs_from(entry["tokens"][part], tensors) for part in ("held_out", "calibration"))
    return Collected(read_statistics(folder, place, entry), held_out, calibration)


def read_statistics(folder: Path, place: int, entry: dict[str, Any]) -> LayerStatistics | None:
    """The same without the tokens; None if no calibration token reached the layer."""
    if entry["num_tokens"] is None:
        return None
    sums = load_file(folder / file_of("statistics", place))
    return LayerStatistics(entry["num_tokens"], sums.pop("selection_count"), sums)


def write_header(
    folder: Path,
    wanted: Wanted,
    model: dict[str, Any],
    calibration: dict[str, Any],
    layers: list[str],
    entries: list[dict[str, Any]],
) -> None:
    """Write `statistics.json`, last: without it the folder is not one of statistics."""
    header = {
        "format_version": FORMAT_VERSION,
        "wanted": wanted.to_dict(),
        "model": model,
        "calibration": calibration,
        "layers": layers,
        "num_tokens": [entry["num_tokens"] for entry in entries],
        "tokens": [entry["tokens"] for entry in entries],
    }
    (folder / HEADER_FILE).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def file_of(kind: str, place: int) -> str:
    """Name of the file of one layer."""
    return f"layer-{place:05d}.{kind}.safetensors"


def describe(inputs: LayerInputs, tensors: dict[str, Tensor], part: str, place: int) -> list[dict[str, Any]]:
    """Inputs of a layer as JSON, one entry a batch; their tensors go into `tensors`."""

    def put(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if isinstance(value, TensorOfBlock):
            return {"of_block": value.name}
        if not isinstance(value, PLAIN):
            raise ValueError(
                f"The router of layer {place} is called with a {type(value).__name__}, which cannot be saved. "
                "Compress with the calibration data itself."
            )
        return {"value": value}

    entries = []
    for batch, (given, (args, kwargs)) in enumerate(zip(inputs.experts_inputs, inputs.router_calls, strict=True)):
        name = f"{part}.{batch}"
        experts = [put(value, f"{name}.experts.{position}") for position, value in enumerate(given)]
        call = [put(value, f"{name}.router.{position}") for position, value in enumerate(args)]
        named = {key: put(value, f"{name}.router.{key}") for key, value in kwargs.items()}
        entries.append({"experts": experts, "router": call, "router_named": named})
        if inputs.outputs:
            entries[-1]["output"] = put(inputs.outputs[batch], f"{name}.output")
    return entries


def inputs_from(entries: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> LayerInputs:
    """The inverse of `describe`."""

    def get(entry: dict[str, Any]) -> Any:
        if "tensor" in entry:
            return tensors[entry["tensor"]]
        return TensorOfBlock(entry["of_block"]) if "of_block" in entry else entry["value"]

    inputs = LayerInputs()
    for entry in entries:
        inputs.experts_inputs.append(tuple(get(value) for value in entry["experts"]))
        args = tuple(get(value) for value in entry["router"])
        inputs.router_calls.append((args, {key: get(value) for key, value in entry["router_named"].items()}))
        if "output" in entry:
            inputs.outputs.append(get(entry["output"]))
    return inputs


def fingerprint_of(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one model from another, as JSON: its configuration, and hashes of routers and of some expert weights.

    Of the experts the sum of each expert's parameters is hashed: reading them all takes a moment, and a fine-tuned
    copy must not pass.
    """
    return {"config": configuration_of(model), "layers": {layer.name: hash_of(layer) for layer in find_layers(model)}}


def configuration_of(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration as JSON, without what does not tell one model from another."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    return config


def hash_of(layer: MoeLayer) -> str:
    """SHA-256 over the router's tensors and the sums of the experts'."""
    digest = hashlib.sha256()
    with fetched(layer.block):
        for tensor in [*layer.router.parameters(), *layer.router.buffers()]:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    with fetched(layer.experts):
        for parameter in layer.expert_parameters.values():
            sums = parameter.detach().flatten(1).double().sum(1)
            digest.update(sums.float().cpu().numpy().tobytes())
    return digest.hexdigest()
