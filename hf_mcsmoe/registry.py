"""One registry per plug-in folder: the names of the interchangeable parts of a pipeline step."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def closest(name: str, choices: Any) -> str:
    """The end of an error message: " Did you mean 'x'?" for a near miss among `choices`, else ""."""
    near = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class Registry:
    """Names of the interchangeable functions of one pipeline step, e.g. all merging operators.

    A function's keyword-only parameters with a default are the options a recipe may set. Those without one are what
    it asks the pipeline for beside its fixed arguments, by name: "statistics", "tokens", ... `needs` names the
    statistics that it reads, so that calibration collects these and no others.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Callable] = {}
        self._needs: dict[str, frozenset[str]] = {}
        self._traits: dict[str, dict[str, Any]] = {}

    def register(self, name: str, *, needs: tuple[str, ...] = (), **traits: Any) -> Callable[[Callable], Callable]:
        """Decorator that adds a function under `name` and returns it unchanged.

        Args:
            name: Unique in this registry.
            needs: Statistics that it reads.
            traits: What else the pipeline must know of it; the folder's `__init__` says which there are. `check` is
                one in all of them: (all options of the function by name) -> None, raising ValueError for a value
                that is not allowed.

        Raises:
            ValueError: `name` is taken.
        """

        def add(function: Callable) -> Callable:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is already registered. Choose another name.")
            self._entries[name] = function
            self._needs[name] = frozenset(needs)
            self._traits[name] = traits
            return function

        return add

    def __getitem__(self, name: str) -> Callable:
        if name not in self._entries:
            raise ValueError(
                f"Unknown {self.kind} {name!r}; choose one of {sorted(self._entries)}.{closest(name, self._entries)}"
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def needs(self, name: str) -> frozenset[str]:
        """Statistics that the function `name` reads."""
        self[name]
        return self._needs[name]

    def trait(self, name: str, trait: str, default: Any = None) -> Any:
        """A trait of the function `name`; `default` where its decorator did not say."""
        self[name]
        return self._traits.get(name, {}).get(trait, default)

    def asks_for(self, name: str) -> frozenset[str]:
        """What the function `name` asks the pipeline for beside its fixed arguments."""
        parameters = inspect.signature(self[name]).parameters.values()
        return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)

    def call(
        self, name: str, *arguments: Any, options: Mapping[str, Any], supply: Mapping[str, Callable[[], Any]]
    ) -> Any:
        """Call the function `name` with what it asks for.

        Args:
            name: In this registry.
            arguments: The fixed ones of the step.
            options: Of the recipe.
            supply: How to get what a function may ask for, by name; only what it asks for is made.
        """
        return self[name](*arguments, **{asked: supply[asked]() for asked in self.asks_for(name)}, **options)

    def options(self, name: str) -> dict[str, Any]:
        """Options of the function `name` with their defaults."""
        parameters = inspect.signature(self[name]).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}

    def check_options(self, name: str, options: dict[str, Any]) -> None:
        """Raise ValueError for an option that the function `name` does not have, or for a value it cannot have."""
        known = self.options(name)
        for option in options:
            if option not in known:
                raise ValueError(
                    f"{self.kind} {name!r} has no option {option!r}; it has {sorted(known)}.{closest(option, known)}"
                )
        check = self.trait(name, "check")
        if check is not None:
            check(known | dict(options))


def import_submodules(package_name: str, package_path: Any) -> None:
    """Import every module of a plug-in folder, so that a new file registers itself. Errors propagate."""
    for module in pkgutil.iter_modules(package_path):
        importlib.import_module(f"{package_name}.{module.name}")
