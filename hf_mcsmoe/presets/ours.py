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
# One layer after another: its targets also make up for what the compressed layers before it lost.
CORRECTED = {"sequential": True, "targets": "original_stream"}
# Joint costs are those of a linear refit: better where no more than that follows, and not where Adam does.
JOINTLY = {"selection": "joint_obs", "matching": "gauss_newton"}
IN_ORDER = (
    "Layers go one after another, and each is fitted to bring the residual stream back to the original model's, so it "
    "also makes up for what the ones before it lost. Each layer runs twice more, as it was and compressed."
)
JOINT_ORDER = (
    "Neurons go by the Optimal Brain Surgeon, applied to the gated features of all experts of a layer together; then "
    "one ridge regression fits all its down projections."
)
STEP = (
    "After that one Gauss-Newton step on the gate and up projections, by five conjugate gradients, and the regression "
    "again."
)
# Where a layer makes up for others, its experts move further: more and larger steps than for themselves alone.
FURTHER = {"steps": 300, "learning_rate": 0.33}
WIDE, NARROW = (
    "The budget is shared by all experts of a layer, so they end up with different widths.",
    "All experts become equally narrow, so the result is a plain model of the same class.",
)

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
        notes=f"{OBS} {WIDE}",
        recipe=SELECT_AND_REFIT,
    ),
    "narrow-obs": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{OBS} {NARROW}",
        recipe={"layout": "native", **SELECT_AND_REFIT},
    ),
    "joint-obs-matched": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{OBS} {WIDE} {MATCHED}",
        recipe={**SELECT_AND_REFIT, "matching": "adam"},
    ),
    "narrow-obs-matched": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{OBS} {NARROW} {MATCHED}",
        recipe={"layout": "native", **SELECT_AND_REFIT, "matching": "adam"},
    ),
    "joint-obs-corrected": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{JOINT_ORDER} {WIDE} {IN_ORDER} {STEP}",
        recipe={**SELECT_AND_REFIT, **CORRECTED, **JOINTLY},
    ),
    "narrow-obs-corrected": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{JOINT_ORDER} {NARROW} {IN_ORDER} {STEP}",
        recipe={"layout": "native", **SELECT_AND_REFIT, **CORRECTED, **JOINTLY},
    ),
    "joint-obs-corrected-matched": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{OBS} {WIDE} {IN_ORDER} {MATCHED}",
        recipe={**SELECT_AND_REFIT, **CORRECTED, "matching": "adam", "matching_options": FURTHER},
    ),
    "narrow-obs-corrected-matched": Preset(
        paper=OURS,
        url=SURGEON,
        notes=f"{OBS} {NARROW} {IN_ORDER} {MATCHED}",
        recipe={"layout": "native", **SELECT_AND_REFIT, **CORRECTED, "matching": "adam", "matching_options": FURTHER},
    ),
}
