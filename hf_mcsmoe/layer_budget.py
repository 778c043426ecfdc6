"""What the budget of a recipe means for one layer, and what a shared part rules out."""

import math
import re
from typing import Any

from .allocation import ALLOCATION
from .decomposition import DECOMPOSITION
from .grouping import GROUPING
from .merging import MERGING

ALIGNED_NEURONS = 8  # 16 bytes in 16-bit dtypes
FIT = "fit"  # in place of a share: the largest that fits a memory
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(size: int | str) -> int:
    """Bytes of a number, or of a text such as "24GB" (powers of ten) or "24GiB" (of two).

    Raises:
        ValueError: It is neither, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise ValueError(f"The size {size!r} is not one. Give bytes as a number, or a text such as 24GB or 24GiB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def is_number(value: Any, kind: Any) -> bool:
    """Whether `value` is of a number type; True and False, which Python counts as 1 and 0, are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


class LayerBudget:
    """Of a `Recipe`: how many experts, neurons and ranks a layer keeps, and budgets that cannot be meant."""

    keep: float | str | None
    num_experts: int | None
    fit: int | str | None
    context_length: int | None
    rows: int | None
    layout: str
    allocation: str
    grouping: str
    alignment: str | None
    merging: str | None
    selection: str | None
    keep_experts: float | None
    shared_base: str | None
    decomposition: str | None
    fit_tokens: int
    every_expert_tokens: int
    gradient_tokens: int

    def _check_budget(self) -> None:
        if self.keep is None and self.num_experts is None:
            object.__setattr__(self, "keep", 0.5 if self.fit is None else FIT)
        if self.keep is not None and self.num_experts is not None:
            raise ValueError(
                f"keep is {self.keep} and num_experts is {self.num_experts}; they say the same. Give one of them."
            )
        self._check_fit()
        is_share = is_number(self.keep, float | int) and 0 < self.keep <= 1
        if self.keep is not None and not (is_share or self.keep == FIT):
            raise ValueError(f"keep is {self.keep!r}, it must be in (0, 1] or {FIT!r}. 0.5 keeps half of the experts.")
        if self.num_experts is not None and not (is_number(self.num_experts, int) and self.num_experts >= 1):
            raise ValueError(f"num_experts is {self.num_experts!r}, it must be a whole number >= 1.")
        self._check_neuron_budget()

    def _check_fit(self) -> None:
        if self.keep == FIT:
            if self.fit is None:
                raise ValueError(f"keep is {FIT!r}, but fit is None. Give the memory, such as fit='24GB'.")
            parse_bytes(self.fit)
        for name in ("fit", "context_length", "rows"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.keep != FIT:
                budget = f"keep is {self.keep!r}" if self.keep is not None else f"num_experts is {self.num_experts}"
                raise ValueError(f"{name} is {value!r}, but {budget}. Use keep={FIT!r}, or leave {name} out.")
            if name != "fit" and not (is_number(value, int) and value >= 1):
                raise ValueError(f"{name} is {value!r}, it must be a whole number >= 1. Leave it out for the default.")

    def _check_neuron_budget(self) -> None:
        for name in ("fit_tokens", "every_expert_tokens", "gradient_tokens"):
            value = getattr(self, name)
            if not (is_number(value, int) and value >= 1):
                raise ValueError(f"{name} is {value!r}, it must be a whole number >= 1.")
        is_ranked = self.decomposition in DECOMPOSITION and self.is_ranked
        if self.selection is None and not is_ranked:
            if self.keep_experts is not None:
                raise ValueError(
                    f"keep_experts is {self.keep_experts}, but selection is None. Use keep, or name a selection."
                )
            return
        if self.num_experts is not None:
            what = f"decomposition {self.decomposition!r} keeps ranks"
            what = what if is_ranked else f"selection {self.selection!r} keeps neurons"
            raise ValueError(
                f"num_experts is {self.num_experts}, but {what}. "
                "Use keep, and keep_experts for the share of the experts."
            )
        if self.keep_experts is None:
            return
        # Unions of neurons may be wider than experts were, but the configuration of a plain model has one width.
        widens = self.unites and self.layout == "mapped"
        least = 0 if self.keep == FIT or widens else self.keep
        is_share = is_number(self.keep_experts, float | int) and 0 < self.keep_experts <= 1
        if widens and not is_share:
            raise ValueError(
                f"keep_experts is {self.keep_experts!r}, it must be in (0, 1]: the share of the experts that stays. "
                "Leave it out for keep."
            )
        if not is_share or self.keep_experts < least:
            raise ValueError(
                f"keep_experts is {self.keep_experts!r}, it must be in [keep, 1] = [{self.keep}, 1]: the experts that "
                "stay are narrowed to the share keep of all neurons."
            )

    def _check_allotted_neurons(self) -> None:
        if self.allots_neurons and self.selection is None:
            raise ValueError(
                f"allocation is {self.allocation!r}, which shares neurons among layers, but selection is None. "
                "Name a selection, such as 'joint_obs', or use another allocation."
            )
        if self.allots_neurons and self.unites:
            raise ValueError(
                f"allocation is {self.allocation!r}, which measures the original experts, but merging "
                f"{self.merging!r} makes others of their neurons. Leave one of them out."
            )

    @property
    def allots_neurons(self) -> bool:
        """Whether layers keep different shares of their neurons, as the allocation finds."""
        return ALLOCATION.trait(self.allocation, "allots", "experts") == "neurons"

    def _check_union(self) -> None:
        """Refuse unions of neurons that nothing would cut to the budget, or of groups that have one member each."""
        if not self.unites or self.keep == 1:
            return
        if self.selection is None:
            raise ValueError(
                f"merging {self.merging!r} keeps the neurons of all members and selection is None, so nothing would "
                "be saved. Use selection='joint_obs'."
            )
        if GROUPING.trait(self.grouping, "drops", False):
            raise ValueError(
                f"merging is {self.merging!r}, but grouping {self.grouping!r} drops experts, so no group has neurons "
                "to unite. Use grouping='dominant_experts', or merging=None."
            )

    def experts_per_layer(self, num_experts: int) -> int:
        """Average number of experts that a layer of `num_experts` keeps.

        `keep`, or with `selection` `keep_experts`, is rounded half up; the result is at least 1. With
        `shared_base` all stay. Without `keep_experts`, a selection keeps all, one from unions the share `keep`.
        """
        if self.num_experts is not None:
            return self.num_experts
        if self.shared_base is not None:
            return num_experts
        if self.is_ranked:
            share = self.keep_experts or math.sqrt(self.keep)
        else:
            all_stay = self.selection is not None and not self.unites
            share = self.keep_experts or (1.0 if all_stay else self.keep)
        return max(1, math.floor(share * num_experts + 0.5))

    def neurons_per_layer(self, num_experts: int, width: int, num_kept: int) -> int:
        """Neurons that a layer of `num_experts` experts of `width` keeps when `num_kept` of the experts stay.

        `keep` is rounded half up: to whole neurons of the layer, or in the native layout to a width for each of the
        experts. That is a multiple of 8 where `width` is one (of the largest power of 2 that divides `width`, below
        8): grouped kernels take rows of whole 16 bytes only. Experts that are unions, of all neurons of the layer,
        may become wider than `width` in the mapped layout; in the native one without `keep_experts` they are as wide.
        """
        if self.selection is None or (self.unites and self.layout == "native" and self.keep_experts is None):
            return num_kept * width
        share = self.keep * num_experts * width
        if self.layout == "native":
            unit = math.gcd(width, ALIGNED_NEURONS)
            return num_kept * min(width, unit * max(1, math.floor(share / (num_kept * unit) + 0.5)))
        available = (num_experts if self.unites else num_kept) * width
        return min(available, max(1, math.floor(share + 0.5)))

    @property
    def unites(self) -> bool:
        """Whether experts become unions of their group's neurons, of which `selection` keeps some."""
        return self.merging in MERGING and bool(MERGING.trait(self.merging, "unites"))

    @property
    def aligns(self) -> bool:
        """Whether neurons are put in order before experts are merged: not where all of them stay beside each other."""
        return self.alignment is not None and self.merging is not None and not self.unites

    @property
    def is_ranked(self) -> bool:
        """Whether `keep` is divided between the experts that stay and the ranks of their matrices."""
        return self.decomposition is not None and bool(DECOMPOSITION.trait(self.decomposition, "ranked"))

    def decomposes(self, num_experts: int) -> bool:
        """Whether experts of a layer of `num_experts` become factors: not where a ranked budget is met without."""
        if not self.is_ranked:
            return self.decomposition is not None
        return self.keep * num_experts < self.experts_per_layer(num_experts)

    def mean_rank(self, num_experts: int, shape: tuple[int, int]) -> int:
        """Rank of a matrix (O, I) of the experts that stay of `num_experts`, with a ranked decomposition on average.

        The largest with which they take at most the share `keep` of the numbers of all; at least 1.
        """
        outputs, inputs = shape
        share = self.keep * num_experts / self.experts_per_layer(num_experts)
        return max(1, math.floor(share * outputs * inputs / (outputs + inputs)))

    @property
    def shares_experts(self) -> bool:
        """Whether experts become parts of something shared; with `keep=1` they stay as they are."""
        return self.shared_base is not None and self.keep < 1


def check_shared_recipe(recipe: Any) -> None:
    """Refuse a recipe with `shared_base` and what does not go with it.

    Raises:
        ValueError: The native layout, a number of experts, or a step for experts of their own.
    """
    if recipe.layout == "native":
        raise ValueError("shared_base needs layout 'mapped', got 'native'. No plain model can hold a shared part.")
    if recipe.num_experts is not None:
        raise ValueError(
            f"num_experts is {recipe.num_experts}, but with shared_base {recipe.shared_base!r} all experts stay. "
            "Use keep: the share of the numbers of their matrices."
        )
    for step in ("selection", "refit", "matching", "decomposition"):
        if getattr(recipe, step) is not None:
            raise ValueError(
                f"shared_base is {recipe.shared_base!r} and {step} is {getattr(recipe, step)!r}, which is for experts "
                "of their own. Leave one of them out."
            )
