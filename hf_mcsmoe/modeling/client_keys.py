"""The keys of config.json that other runtimes read: old and new spellings beside each other.

mlx-lm, llama.cpp's converter and others read the file, not transformers' configuration class. transformers writes
each value under one name, that of its present version: `num_local_experts` and `rope_parameters` where the base model
and the runtimes say `num_experts` and `rope_theta`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..families.names import NUM_EXPERTS_NAMES
from ..local_paths import hub_id
from .native_config import config_parts
from .native_width import WIDTH_NAMES

# What a base model's file says of itself and not of the model that was made of it.
NOT_INHERITED = {
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "compression_config",
    "name_or_path",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "unsloth_version",
    "use_cache",
}


def add_client_keys(folder: Path, config: PreTrainedConfig, base_model: str | None = None) -> None:
    """Add to config.json of a native checkpoint what other runtimes look for. No key that is there is changed.

    These are the number of experts under every name that the configuration class knows for it, `rope_theta` and
    `rope_scaling` beside `rope_parameters`, `torch_dtype` beside `dtype`, and what the base model's file says besides:
    with the value that the result has for it, or word for word where transformers does not know the key. Inner
    configurations are treated in the same way. transformers reads the file to the same configuration as before.
    A mapped checkpoint, which needs our classes anyway, stays as it is.

    Args:
        folder: Holds config.json as `save_pretrained` wrote it.
        config: The configuration that it was written from.
        base_model: Folder or Hub id of the base model, for the spellings of its file; None, or a model whose file is
            neither here nor in the cache: those are left out.
    """
    if hasattr(config, "merged_sparse_moe"):
        return
    path = folder / CONFIG_NAME
    values = json.loads(path.read_text(encoding="utf-8"))
    base = raw_config(base_model)
    for part_path, part in config_parts(config):
        section = section_at(values, part_path)
        if section is not None:
            add_counts(section, part)
            add_rope(section)
            if "dtype" in section:
                section.setdefault("torch_dtype", section["dtype"])
            add_base_keys(section, part, section_at(base, part_path) or {})
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def raw_config(name: str | None) -> dict[str, Any]:
    """What config.json of a model says, from its folder or the cache; {} where there is none. Asks no server."""
    path = Path(name or "") / CONFIG_NAME
    if name and not path.is_file() and hub_id(name):
        cached = try_to_load_from_cache(name, CONFIG_NAME)
        path = Path(cached) if isinstance(cached, str) else path
    if not name or not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # another model's damaged file is no reason to lose a finished run
        return {}
    return values if isinstance(values, dict) else {}


def section_at(values: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """The inner configuration at a path like "thinker_config.text_config"; None where there is none."""
    found: Any = values
    for name in path.split(".") if path else ():
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, dict) else None


def add_counts(section: dict[str, Any], config: PreTrainedConfig) -> None:
    """The number of experts under the names that the configuration class takes for one."""
    for alias, name in config.attribute_map.items():
        if alias in NUM_EXPERTS_NAMES and name in section:
            section.setdefault(alias, section[name])


def add_rope(section: dict[str, Any]) -> None:
    """`rope_theta`, `partial_rotary_factor` and `rope_scaling`, as before transformers 5, where layers share them."""
    rope = section.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return  # none, or one for each type of layer, which no single key could say
    section.setdefault("rope_theta", rope["rope_theta"])
    if "partial_rotary_factor" in rope:
        section.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    is_scaled = rope.get("rope_type", "default") != "default"
    section.setdefault("rope_scaling", scaling if is_scaled else None)


def add_base_keys(section: dict[str, Any], config: PreTrainedConfig, base: Mapping[str, Any]) -> None:
    """Keys of the base model's file that the new one lacks."""
    for name, value in base.items():
        if name in section or name in NOT_INHERITED or isinstance(value, Mapping):
            continue
        try:
            value = getattr(config, name, value)
        except RuntimeError:  # a configuration with per-layer values of this name
            continue
        if name in (*NUM_EXPERTS_NAMES, *WIDTH_NAMES) and not hasattr(config, name):
            continue  # it may say what is no longer true
        if is_plain(value):
            section[name] = value


def is_plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
