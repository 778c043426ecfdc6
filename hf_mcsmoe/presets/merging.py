"""Methods that merge experts."""

from .preset import Preset

M_SMOE = "the groups of Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy (2024)"
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
    "merge-moe": Preset(
        paper="MergeMoE: Efficient Compression of MoE Models via Expert Output Merging (2025)",
        url="https://arxiv.org/abs/2510.14436",
        notes="Averages gate and up and fits down by least squares, here with a ridge: without one the paper's fit "
        "collapses on few tokens (merging_options={'ridge': 0} is as published). alignment='weight_matching' is the "
        "step that the paper leaves out.",
        recipe={
            "allocation": "uniform",
            "similarity": "inner_weights",
            "alignment": None,
            "merging": "least_squares_down",
        },
    ),
    "m-smoe-average": Preset(
        paper=f"The plain mean in {M_SMOE}",
        url="https://arxiv.org/abs/2310.01334",
        notes="An ablation: m-smoe with all members of a group counted alike.",
        recipe={"merging": "average"},
    ),
    "m-smoe-ties": Preset(
        paper=f"TIES-Merging: Resolving Interference When Merging Models (Yadav et al., 2023) in {M_SMOE}",
        url="https://arxiv.org/abs/2306.01708",
        notes="m-smoe with TIES around the dominant expert; experts rarely share an ancestor, as TIES assumes.",
        recipe={"merging": "ties"},
    ),
    "m-smoe-zipit": Preset(
        paper=f"ZipIt! Merging Models from Different Tasks without Training (Stoica et al., 2023) in {M_SMOE}",
        url="https://arxiv.org/abs/2305.03053",
        notes="m-smoe whose members are merged neuron by neuron where activations correlate, also within one expert. "
        "Clusters by their mean correlation instead of a damped minimum.",
        recipe={"alignment": None, "merging": "zipit"},
    ),
    "m-smoe-pleas": Preset(
        paper=f"PLeaS: Merging Models with Permutations and Least Squares (Nasery et al., 2024) in {M_SMOE}",
        url="https://arxiv.org/abs/2407.02447",
        notes="m-smoe with a full permutation and a regression of down on averaged activations; a partial width, "
        "which PLeaS also has, is not possible where all experts are equally wide.",
        recipe={"merging": "pleas"},
    ),
    "m-smoe-union": Preset(
        paper=f"Ours, without a paper, in {M_SMOE}",
        url="https://arxiv.org/abs/2310.01334",
        notes="m-smoe that averages nothing: the neurons of a group's members stay side by side under the sum of "
        "their gates, the Optimal Brain Surgeon takes those that the layer's output needs least, and one ridge "
        "regression fits all down projections of a layer to its original output. The budget is shared by all groups "
        "of a layer, which end up with different widths; layout='native' makes them as wide as the experts were, a "
        "plain model. More and smaller groups of the same neurons (keep_experts above keep) lose less, and so does "
        "selection='joint_obs', in twice the time.",
        # A token has as many more features as its groups have members, so it takes fewer tokens in the same time.
        recipe={
            "alignment": None,
            "merging": "union",
            "selection": "gated_obs",
            "refit": "least_squares",
            "fit_tokens": 12_288,
        },
    ),
    "dern": Preset(
        paper="Dropping Experts, Recombining Neurons: Retraining-Free Pruning for Sparse Mixture-of-Experts LLMs "
        "(Zhou et al., 2025)",
        url="https://arxiv.org/abs/2509.10377",
        notes="Follows a third party's implementation; threshold and norm equalisation are our reading. Router rows "
        "move with the segments where that lowers the error on held-out tokens.",
        recipe={
            "layout": "native",
            "allocation": "uniform",
            "similarity": None,
            "grouping": "drop",
            "alignment": None,
            "merging": "recombined_segments",
            "router": "proportional_transfer",
        },
    ),
}
