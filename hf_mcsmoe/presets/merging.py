"""Methods that merge experts."""

from .preset import Preset

PRESETS = {
    "hc-smoe": Preset(
        paper="Retraining-Free Merging of Sparse MoE via Hierarchical Clustering (Chen et al., 2024)",
        url="https://arxiv.org/abs/2410.08589",
        notes="Clusters experts by their mean outputs (average linkage) and averages each cluster by usage, without "
        "alignment as published. Means are taken over `every_expert_tokens` calibration tokens, not over all of them.",
        recipe={
            "allocation": "uniform",
            "similarity": "mean_output_distance",
            "grouping": "hierarchical",
            "alignment": None,
        },
    ),
    "ream": Preset(
        paper="REAM: Merging Improves Pruning of Experts in LLMs (2026)",
        url="https://arxiv.org/abs/2604.04356",
        notes="Follows the public code where it says what it means; activations are compared on the same tokens, "
        "padding does not count, and the saliency is that of REAP with the gate once, where the code has its square.",
        recipe={
            "layout": "native",
            "saliency": "gated_output_norm",
            "allocation": "uniform",
            "similarity": "gated_outputs_and_logits",
            "grouping": "pseudo_pruning",
            "alignment": "weights_and_activations",
            "merging": "weighted_average_without_zeros",
            "importance": "gated_output_norm",
            "sequential": True,
            "fit_tokens": 32_768,
        },
    ),
    "sub-moe": Preset(
        paper="Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging (Li et al., 2025)",
        url="https://arxiv.org/abs/2506.23266",
        notes="Its merge is the weighted average unless merging_options gives a rank: at full rank the joint SVD "
        "changes nothing. How the budget of two layers is divided is our reading of the paper.",
        recipe={
            "allocation": "joint_kmeans",
            "similarity": "output_cosine",
            "grouping": "kmeans",
            "alignment": None,
            "merging": "joint_svd",
        },
    ),
}
