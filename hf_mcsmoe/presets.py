"""Presets: methods as recipes, published ones and ours. Data, one entry a method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method: its recipe, and where it comes from."""

    paper: str
    url: str
    notes: str
    recipe: Mapping[str, Any]


OURS = (
    "Ours, without a paper; it builds on Second order derivatives for network pruning: Optimal Brain Surgeon "
    "(Hassibi & Stork, 1993)"
)
SURGEON = "https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html"
# Whole experts stay whole until the selection takes neurons; which experts stay is a matter of their use.
SELECT_AND_REFIT = {
    "allocation": "uniform",
    "similarity": None,
    "grouping": "drop",
    "alignment": None,
    "merging": None,
    "selection": "gated_obs",
    "refit": "least_squares",
}
OBS = (
    "Neurons go by the Optimal Brain Surgeon, applied to the gated features of each expert on calibration tokens; "
    "then one ridge regression fits all down projections of a layer to its original output."
)
MATCHED = "After that a few hundred steps of Adam on the experts of each layer alone, and the regression again."

PRESETS: dict[str, Preset] = {
    "auto": Preset(
        paper=OURS,
        url=SURGEON,
        notes="Tries several recipes on copies of the model and takes the one of least KL on held-out calibration "
        "tokens. The steps here are not what it does; the report says which recipe it took.",
        recipe={},
    ),
    "m-smoe": Preset(
        paper="Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy (Li et al., 2024)",
        url="https://arxiv.org/abs/2310.01334",
        notes="Aligns members to their group's dominant expert, not to expert 0: one assignment each, never worse.",
        recipe={},
    ),
    "mc-smoe": Preset(
        paper="Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy (Li et al., 2024)",
        url="https://arxiv.org/abs/2310.01334",
        notes=(
            "m-smoe, then every matrix of the merged experts as factors of rank 32 plus a tenth of the rows of what "
            "they miss. The paper prunes the rows while it trains a model that was recovered before; here they are "
            "pruned at once by their norm, which is a start for such a training and loses much without one. "
            "decomposition='whitened_low_rank_sparse' loses less: it minimises the error of the outputs."
        ),
        recipe={"decomposition": "low_rank_sparse", "decomposition_options": {"rank": 32, "keep_rows": 0.1}},
    ),
    "frequency": Preset(
        paper="Usage-frequency pruning, the baseline of Li et al., 2024",
        url="https://arxiv.org/abs/2310.01334",
        notes="Keeps the most used experts as they are and drops the others.",
        recipe={"similarity": None, "grouping": "drop", "alignment": None, "merging": None},
    ),
    "joint-obs": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{OBS} The budget is shared by all experts of a layer, so they end up with different widths.",
        recipe=SELECT_AND_REFIT,
    ),
    "narrow-obs": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{OBS} All experts become equally narrow, so the result is a plain model of the same class.",
        recipe={"layout": "native", **SELECT_AND_REFIT},
    ),
    "joint-obs-matched": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{OBS} The budget is shared by all experts of a layer, so they end up with different widths. {MATCHED}",
        recipe={**SELECT_AND_REFIT, "matching": "adam"},
    ),
    "narrow-obs-matched": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{OBS} All experts become equally narrow, so the result is a plain model of the same class. {MATCHED}",
        recipe={"layout": "native", **SELECT_AND_REFIT, "matching": "adam"},
    ),
}
