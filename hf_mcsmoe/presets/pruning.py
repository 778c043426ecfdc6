"""Experts that are dropped, by one score or another; what stays, stays as it is."""

from .preset import Preset

DROP = {"allocation": "uniform", "similarity": None, "grouping": "drop", "alignment": None, "merging": None}

PRESETS = {
    "frequency": Preset(
        paper="Usage-frequency pruning, the baseline of Li et al., 2024",
        url="https://arxiv.org/abs/2310.01334",
        notes="Keeps the most used experts as they are and drops the others.",
        recipe={"similarity": None, "grouping": "drop", "alignment": None, "merging": None},
    ),
    "reap": Preset(
        paper="REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression (Lasby et al., 2025)",
        url="https://arxiv.org/abs/2510.13999",
        notes="Keeps the experts whose gated outputs are largest where the router uses them; gates as the model "
        "applies them.",
        recipe={"layout": "native", **DROP, "saliency": "gated_output_norm"},
    ),
}
