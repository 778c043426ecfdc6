"""Recipe: what the user asks for."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .alignment import ALIGNMENT
from .allocation import ALLOCATION
from .constants import CONSTANTS
from .decomposition import DECOMPOSITION
from .grouping import GROUPING
from .layer_budget import LayerBudget, check_shared_recipe
from .matching import MATCHING
from .merging import MERGING
from .presets import PRESETS
from .protection import PROTECTION
from .refit import REFIT
from .registry import Registry, closest
from .router_rows import ROUTER_ROWS
from .saliency import SALIENCY
from .selection import SELECTION
from .shared_base import SHARED_BASE
from .similarity import SIMILARITY
from .solvers.low_rank import check_budget
from .statistics import STATISTICS
from .targets import check_targets

LAYOUTS = ("mapped", "native")
STEPS: dict[str, Registry] = {
    "protect": PROTECTION,
    "saliency": SALIENCY,
    "allocation": ALLOCATION,
    "similarity": SIMILARITY,
    "grouping": GROUPING,
    "alignment": ALIGNMENT,
    "merging": MERGING,
    "importance": SALIENCY,
    "constants": CONSTANTS,
    "selection": SELECTION,
    "shared_base": SHARED_BASE,
    "router": ROUTER_ROWS,
    "refit": REFIT,
    "matching": MATCHING,
    "decomposition": DECOMPOSITION,
}
OPTIONAL_STEPS = tuple(step for step in STEPS if step not in ("saliency", "allocation", "grouping", "importance"))
NOT_STATISTICS = {"weights", "input_gram"}  # the weights themselves, and what is made of tokens that a layer keeps


@dataclass(frozen=True)
class Recipe(LayerBudget):
    """Which steps compress the experts, and how far.

    Every step is a name in the registry of its folder; `<step>_options` holds that function's options.

    Attributes:
        keep: Share of the experts (of the layers that are not excluded) that stays, in (0, 1]. With `selection` the
            share of their neurons, in all experts together; with `shared_base` that of the numbers of their matrices.
            "fit" is the largest share whose result fits the memory `fit`, found before work starts.
        fit: That memory, as bytes or such as "24GB", for weights, cache and activations; alone it means keep="fit".
        context_length: With `fit`: tokens of a row in the cache; None for 4096.
        rows: With `fit`: rows in the cache; None for one.
        num_experts: The same as an average number per layer; exclusive with `keep`.
        layout: "mapped" (router keeps its N rows and an index map) or "native" (fewer router rows, plain model).
        protect: Which experts are never dropped and never merged, whatever their saliency; None protects none.
        saliency: Score that decides which experts lead.
        allocation: How many experts each layer keeps, or neurons of a `selection`; None takes "global_usage" for the
            mapped layout, "uniform" for the native one, where all have the same number, and with `selection`.
        similarity: How alike experts are; None where the grouping does not ask.
        grouping: Which experts become one.
        alignment: Neuron order before merging; None leaves neurons as they are.
        merging: How the members of a group become one matrix; None keeps the dominant expert (pruning); "union"
            keeps the neurons of all members, for `selection` to choose among.
        importance: Score that weighs the members in the merge.
        constants: The vector that the slot of a dropped expert adds, times its gate, in the mapped layout; None adds
            nothing.
        selection: Saliency of single neurons, of which the least salient go; None keeps experts whole. In the
            mapped layout experts become as wide as their neurons deserve, in the native one all equally wide.
        keep_experts: With `selection`, the share of the experts that stays, narrowed to what `keep` leaves them; None
            keeps all experts, or with merging="union" the share `keep`, about as wide as they were (below `keep` they
            become wider, in the mapped layout). With a ranked decomposition the share that stays, whose ranks take
            the rest of `keep`; None takes the root of `keep`.
        shared_base: What all experts of a layer share, of which each keeps a small part of its own; all experts and
            the router stay, in the mapped layout. None stores experts one by one.
        router: What the rows of a router that is cut become, in the native layout; None, or a rule that does not lower
            a layer's error on held-out tokens, keeps the rows of the dominant experts.
        refit: How the down projections of all experts of a layer, with that of a shared expert and the constants of
            dropped slots, are fitted to its original output; None leaves them.
        matching: How each layer alone is trained to give what the original one gave, after the refit; None does not.
        sequential: Statistics and tokens of each layer come from the compressed layers before it, not from the
            original ones. Each layer runs twice more, before it is compressed and after.
        targets: What refit and matching of a layer aim at. None: what its original experts give for the tokens that
            it is given. "original_stream", with `sequential`: what makes the residual stream after the layer that of
            the original model, so that each layer also makes up for what the compressed ones before it lost.
        fit_tokens: Calibration tokens that selection, refit and other steps that run experts again see, about.
        every_expert_tokens: Calibration tokens that all experts are run on, about, where a statistic asks for that.
        gradient_tokens: Calibration tokens, about, that run backward too, where a statistic reads gradients.
        exclude_layers: Layers that stay: positions of MoE layers (int), `fnmatch` patterns of experts modules (str).
        decomposition: How every matrix of the merged experts becomes W = L R + S of low rank and few rows; None
            leaves it. Its options are `rank` (else 32) or `parameter_ratio`, `keep_rows` (the share of the rows of S)
            and `alternations`.
        collapse_duplicates: In the mapped layout several slots of a token may hold one expert; compute
            it once and add the weights. "auto" does so where held-out tokens show enough duplicates.
        seed: Seeds whatever draws random numbers.
        preset: Which one it started from. Only `recipe_from_preset` sets it: a name alone would claim steps not taken.

    Raises:
        ValueError: A name, an option or a bound is not allowed.
    """

    keep: float | str | None = None
    num_experts: int | None = None
    fit: int | str | None = None
    context_length: int | None = None
    rows: int | None = None
    layout: str = "mapped"
    protect: str | None = None
    saliency: str = "usage_frequency"
    allocation: str | None = None
    similarity: str | None = "router_logits"
    grouping: str = "dominant_experts"
    alignment: str | None = "weight_matching"
    merging: str | None = "weighted_average"
    importance: str = "usage_frequency"
    protect_options: dict[str, Any] = field(default_factory=dict)
    saliency_options: dict[str, Any] = field(default_factory=dict)
    allocation_options: dict[str, Any] = field(default_factory=dict)
    similarity_options: dict[str, Any] = field(default_factory=dict)
    grouping_options: dict[str, Any] = field(default_factory=dict)
    alignment_options: dict[str, Any] = field(default_factory=dict)
    merging_options: dict[str, Any] = field(default_factory=dict)
    importance_options: dict[str, Any] = field(default_factory=dict)
    constants: str | None = None
    constants_options: dict[str, Any] = field(default_factory=dict)
    selection: str | None = None
    selection_options: dict[str, Any] = field(default_factory=dict)
    keep_experts: float | None = None
    shared_base: str | None = None
    shared_base_options: dict[str, Any] = field(default_factory=dict)
    router: str | None = None
    router_options: dict[str, Any] = field(default_factory=dict)
    refit: str | None = None
    refit_options: dict[str, Any] = field(default_factory=dict)
    matching: str | None = None
    matching_options: dict[str, Any] = field(default_factory=dict)
    sequential: bool = False
    targets: str | None = None
    fit_tokens: int = 65_536
    every_expert_tokens: int = 4096
    gradient_tokens: int = 8192
    exclude_layers: tuple[int | str, ...] = ()
    decomposition: str | None = None
    decomposition_options: dict[str, Any] = field(default_factory=dict)
    collapse_duplicates: bool | str = "auto"
    seed: int = 0
    preset: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.exclude_layers, list | tuple):
            raise ValueError(
                f"exclude_layers is {self.exclude_layers!r}, it must be a list of positions and patterns. "
                "Put one entry into a list too."
            )
        object.__setattr__(self, "exclude_layers", tuple(self.exclude_layers))  # YAML and JSON give lists
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}, allowed are {LAYOUTS}.{closest(self.layout, LAYOUTS)}")
        if self.allocation is None:
            is_uniform = self.layout == "native" or self.selection is not None or self.shared_base is not None
            object.__setattr__(self, "allocation", "uniform" if is_uniform else "global_usage")
        self._check_budget()
        self._check_steps()
        self._check_allotted_neurons()
        self._check_combinations()

    def _check_steps(self) -> None:
        for step, registry in STEPS.items():
            name, options = getattr(self, step), getattr(self, f"{step}_options")
            if not isinstance(options, Mapping):
                raise ValueError(f"{step}_options is {options!r}, it must map names to values. Leave it out for none.")
            if name is None and step in OPTIONAL_STEPS:
                if options:
                    raise ValueError(
                        f"{step}_options is {options} but {step} is None. Name the {step} they belong to."
                    )
                continue
            registry.check_options(name, options)

    def _check_combinations(self) -> None:
        if self.layout == "native" and self.allocation != "uniform":
            raise ValueError(
                f"allocation is {self.allocation!r}, but layout 'native' needs the same number of experts in all "
                "layers. Use allocation='uniform' or layout='mapped'."
            )
        asked = GROUPING.asks_for(self.grouping)
        if self.protect is not None and "tokens" in asked and "protected" not in asked:
            raise ValueError(
                f"protect is {self.protect!r}, but grouping {self.grouping!r} judges all experts of a layer together. "
                "Use protect=None or another grouping."
            )
        is_count = self.keep_experts is not None and self.selection is not None
        if is_count and self.allocation != "uniform" and not self.unites:
            raise ValueError(
                f"allocation is {self.allocation!r}, but with keep_experts all layers keep the same number of "
                "neurons, which some could not hold. Use allocation='uniform', or leave keep_experts out."
            )
        # A pattern may name the layers of another part of the model, whose configuration has a number of its own.
        if self.layout == "native" and not all(isinstance(entry, str) for entry in self.exclude_layers):
            raise ValueError(
                f"exclude_layers is {list(self.exclude_layers)}, but layout 'native' needs the same number of experts "
                "in all layers. Use layout='mapped'."
            )
        if GROUPING.trait(self.grouping, "reads_similarity", False) and self.similarity is None:
            raise ValueError(
                f"grouping {self.grouping!r} needs a similarity, got None. Use similarity='router_logits'."
            )
        if self.collapse_duplicates not in (True, False, "auto"):
            raise ValueError(
                f"collapse_duplicates is {self.collapse_duplicates!r}, allowed are True, False and 'auto'."
            )
        check_targets(self)
        self._check_union()
        self._check_results()

    def _check_results(self) -> None:
        """Refuse what the stored experts and routers cannot be."""
        if self.router is not None and self.layout == "mapped":
            raise ValueError(
                f"router is {self.router!r}, but in layout 'mapped' the router keeps all its rows. "
                "Use layout='native', or leave router out."
            )
        if self.shared_base is not None:
            check_shared_recipe(self)
        if self.constants is not None and (
            self.layout != "mapped" or not GROUPING.trait(self.grouping, "drops", False)
        ):
            raise ValueError(
                f"constants is {self.constants!r}, but layout {self.layout!r} with grouping {self.grouping!r} has no "
                "slots of dropped experts. Use layout='mapped' and grouping='drop', or constants=None."
            )
        if self.constants is not None and self.matching_options.get("router"):
            raise ValueError(
                f"constants is {self.constants!r} and matching trains the router, which changes the gates of dropped "
                "slots too. Leave one of them out."
            )
        if self.decomposition is not None and self.layout == "native":
            raise ValueError("decomposition needs layout 'mapped', got 'native'. No plain model can hold factors.")
        if self.decomposition is not None and self.selection is not None:
            raise ValueError(
                f"decomposition is {self.decomposition!r} and selection is {self.selection!r}, but experts of "
                "different widths cannot be decomposed. Leave one of them out."
            )
        if self.is_ranked and "rank" in self.decomposition_options:
            raise ValueError(
                f"decomposition {self.decomposition!r} has no option 'rank': ranks follow from keep. Leave it out, "
                "and use keep_experts for the share of the experts."
            )
        check_budget(self.decomposition_options)

    def statistics_needed(self, steps: Iterable[str] = tuple(STEPS)) -> frozenset[str]:
        """Union of the fields of `LayerStatistics` that the steps read."""
        used = [(STEPS[step], getattr(self, step)) for step in steps if getattr(self, step) is not None]
        return frozenset().union(*(registry.needs(name) for registry, name in used)) - NOT_STATISTICS

    def statistics_with(self, trait: str) -> list[str]:
        """The statistics that the steps read and that have a trait."""
        return sorted(name for name in self.statistics_needed() if STATISTICS.trait(name, trait, False))

    @property
    def is_fitted(self) -> bool:
        """Whether neurons are selected, down projections fitted or layers trained."""
        return not (self.selection is None and self.refit is None and self.matching is None)

    @property
    def is_fitted_on_tokens(self) -> bool:
        """Whether that needs kept calibration tokens; a selection may need statistics only."""
        selects = self.selection is not None and "grams" in SELECTION.asks_for(self.selection)
        return selects or self.refit is not None or self.matching is not None

    @property
    def needs_inputs(self) -> bool:
        """Whether layers are run again on what they were given in calibration."""
        decomposes_inputs = self.decomposition is not None and DECOMPOSITION.needs(self.decomposition)
        if self.is_fitted_on_tokens or self.allots_neurons or decomposes_inputs:
            return True
        used = [(registry, getattr(self, step)) for step, registry in STEPS.items()]
        return any("tokens" in registry.asks_for(name) for registry, name in used if name is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, without defaults; `Recipe(**d)` and `recipe_from_dict(d)` give the recipe back."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["exclude_layers"] = list(self.exclude_layers)
        # What the preset sets is said even where this recipe went back to the default, or it would come back.
        said = {"layout", *(PRESETS[self.preset].recipe if self.preset in PRESETS else ())}
        return {
            name: value
            for name, value in values.items()
            if name in said or (value not in ({}, []) and (name not in defaults or value != defaults[name]))
        }
