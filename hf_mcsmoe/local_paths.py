"""Names of models and files as they may be published: without the folders of the machine that they came from."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# Fields of configurations and reports that name a model by its Hub id or by a folder.
MODEL_FIELDS = ("base_model", "base_model_name_or_path", "name_or_path", "_name_or_path", "model", "teacher")
# An absolute path, or one below the home directory, inside a text. No part of a URL: that follows a word or a colon.
PATH = re.compile(r"(?<![\w/\\.:~<-])(?:~?/|[A-Za-z]:[\\/])[^\s'\"`,;()<>|]*[/\\]([^\s'\"`,;()<>|/\\]+)")


def hub_id(name: str | None) -> str | None:
    """`name` if it can be the id of a model on the Hub, None for a path of this machine."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_model(name: str | None) -> str | None:
    """A Hub id as it is, a path as "./" and its last part: what no longer tells a place, nor passes for a Hub id."""
    if not name or hub_id(name):
        return name
    windows = PureWindowsPath(name)
    last = windows.name if windows.drive else PurePosixPath(name.rstrip("/")).name
    return f"./{last}" if last else None


def without_paths(values: Any) -> Any:
    """A copy of what JSON holds, with the folders cut from every path.

    Args:
        values: Mappings, lists and plain values. Strings in `MODEL_FIELDS` become `public_model`; in all others each
            absolute path is replaced by its last part.
    """
    if isinstance(values, Mapping):
        return {
            key: public_model(value) if key in MODEL_FIELDS and isinstance(value, str) else without_paths(value)
            for key, value in values.items()
        }
    if isinstance(values, list | tuple):
        return [without_paths(value) for value in values]
    return PATH.sub(r"\1", values) if isinstance(values, str) else values


def with_public_models(values: Any) -> Any:
    """A copy of what JSON holds in which only the strings in `MODEL_FIELDS` that are paths were changed.

    For files of other libraries, where a slash may be anything: a special token, a chat template, a pattern.
    """
    if isinstance(values, Mapping):
        return {
            key: public_model(value) if key in MODEL_FIELDS and _is_path(value) else with_public_models(value)
            for key, value in values.items()
        }
    return [with_public_models(value) for value in values] if isinstance(values, list) else values


def _is_path(value: Any) -> bool:
    """Whether a string names a place on a machine for certain."""
    return isinstance(value, str) and (PATH.fullmatch(value) is not None or ("/" in value and Path(value).exists()))
