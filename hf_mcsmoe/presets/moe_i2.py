"""MoE-I2: fewer experts, and a lower rank of those that stay."""

from .preset import Preset

PRESETS = {
    "moe-i2": Preset(
        paper="MoE-I2: Compressing Mixture of Experts Models through Inter-Expert Pruning and Intra-Expert Low-Rank "
        "Decomposition (Yang et al., 2024)",
        url="https://arxiv.org/abs/2411.01016",
        notes="Known second-hand. Budgets by inverse sensitivity, a genetic search for the experts of each layer "
        "(exact where few subsets are possible; not three layers at a time), ranks by importance; `keep` is the share "
        "of all numbers, its root that of the experts. The fine-tuning that follows there is not part of it.",
        recipe={
            "saliency": "left_out_change",
            "allocation": "inverse_sensitivity",
            "similarity": None,
            "grouping": "genetic_subset",
            "alignment": None,
            "merging": None,
            "importance": "left_out_change",
            "decomposition": "importance_ranked",
        },
    ),
}
