"""Fields of DistillationArguments from a YAML file and from options of the command line, checked by their names."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NoReturn

import yaml

# Set by the command itself.
RESERVED = {"output_dir": "--output", "resume_from_checkpoint": "--resume"}


def training_values(config: str | None, options: list[str]) -> dict[str, Any]:
    """The fields that are given, with the values in their types; options come before the file.

    Args:
        config: A YAML file of field names and values, as `HfArgumentParser.parse_yaml_file` reads it; or None.
        options: What the command line has besides its own options: "--learning-rate", "3e-5", "--bf16", ...

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown field (with the closest match), one that the command sets itself, a value of a wrong
            type, or a file that is no mapping.
    """
    from transformers import HfArgumentParser

    from ..training import DistillationArguments

    known = {field.name for field in dataclasses.fields(DistillationArguments) if field.init}
    parser = HfArgumentParser(DistillationArguments)
    parser.error = _refuse
    from_file = {
        # YAML 1.1 reads 1e-4 as a text; the parser of the command line knows what the field is.
        name: _parsed(parser, name, [value]) if isinstance(value, str) else value
        for name, value in _read(config, known).items()
    }
    from_options = {name: _parsed(parser, name, values) for name, values in _split(options, known).items()}
    return {**from_file, **from_options}


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}. See transformers.TrainingArguments for what is allowed.")


def _check_name(name: str, known: set[str], where: str) -> None:
    from ..registry import closest

    if name in RESERVED:
        raise ValueError(f"{name} in {where} is set by {RESERVED[name]}. Leave it out.")
    if name not in known:
        raise ValueError(
            f"{where} has no key {name!r}; allowed are the fields of DistillationArguments and TrainingArguments."
            f"{closest(name, known)}"
        )


def _read(config: str | None, known: set[str]) -> dict[str, Any]:
    if config is None:
        return {}
    path = Path(config).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {config!r} with training arguments. Check --config.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not valid YAML: {error}. Write one 'name: value' a line.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no names and values. Write one 'name: value' a line.")
    for name in values:
        _check_name(name, known, path.name)
    return values


def _split(options: list[str], known: set[str]) -> dict[str, list[str]]:
    """Names with what follows them: "--a-b", "1", "--c=2", "--d" -> a_b: [1], c: [2], d: []."""
    given: dict[str, list[str]] = {}
    name = None
    for word in options:
        if word.startswith("--"):
            name, is_joined, value = word[2:].partition("=")
            name = name.replace("-", "_")
            _check_name(name, known, "the command line")
            given[name] = [value] if is_joined else []
        elif name is None:
            raise ValueError(f"{word!r} belongs to no option. Write one folder, then options as --name value.")
        else:
            given[name].append(word)
    return given


def _parsed(parser: argparse.ArgumentParser, name: str, values: list[str]) -> Any:
    """The value of one field as the parser of the command line makes it."""
    return getattr(parser.parse_args([f"--{name}", *values]), name)
