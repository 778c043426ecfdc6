"""What values options may have, for the trait `check` of a step."""

import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Mapping[str, Any]], None]


def check_all(*checks: Check) -> Check:
    """One check after the other."""

    def check(options: Mapping[str, Any]) -> None:
        for one in checks:
            one(options)

    return check


def check_whole(name: str, least: int, remedy: str, *, or_none: bool = False) -> Check:
    """A check that the option `name` is a whole number >= `least`; `remedy` ends the message."""

    def check(options: Mapping[str, Any]) -> None:
        value = options[name]
        is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not (is_whole or (or_none and value is None)):
            raise ValueError(f"{name} is {value!r}, it must be a whole number >= {least}. {remedy}")

    return check


def check_real(name: str, least: float, most: float, remedy: str) -> Check:
    """A check that the option `name` is a finite number in [`least`, `most`]; `remedy` ends the message."""

    def check(options: Mapping[str, Any]) -> None:
        value = options[name]
        is_real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (is_real and least <= value <= most):
            raise ValueError(f"{name} is {value!r}, it must be in [{least}, {most}]. {remedy}")

    return check


def check_flag(name: str, remedy: str) -> Check:
    """A check that the option `name` is True or False."""

    def check(options: Mapping[str, Any]) -> None:
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} is {options[name]!r}, it must be True or False. {remedy}")

    return check
