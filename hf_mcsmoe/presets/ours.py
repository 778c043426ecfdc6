"""Our own methods, and `auto`, which chooses among them."""

from .preset import Preset

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

PRESETS = {
    "auto": Preset(
        paper=OURS,
        url=SURGEON,
        notes="Tries several recipes on copies of the model and takes the one of least KL on held-out calibration "
        "tokens. The steps here are not what it does; the report says which recipe it took.",
        recipe={},
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
