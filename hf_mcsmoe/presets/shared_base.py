"""All experts stay, as small parts of something that they share."""

from .preset import Preset

# Nothing is grouped or merged: every expert stays in a group of its own.
SHARE = {"allocation": "uniform", "similarity": None, "grouping": "drop", "alignment": None, "merging": None}

PRESETS = {
    "resmoe": Preset(
        paper="ResMoE: Space-efficient Compression of Mixture of Experts LLMs via Residual Restoration (Ai et al., "
        "2025)",
        url="https://arxiv.org/abs/2503.06881",
        notes="Barycentre of the aligned experts, residuals by SVD, without data. Known second-hand; its unstructured "
        "residuals are not offered, because their indices take as much as their values. `keep` counts the base too.",
        recipe={**SHARE, "shared_base": "aligned_residuals"},
    ),
    "d2-moe": Preset(
        paper="Delta Decompression for MoE-based LLMs Compression (Gu et al., 2025)",
        url="https://arxiv.org/abs/2502.17298",
        notes="Base weighted by Fisher information, experts aligned first, whitening with a ridge; the base is not "
        "pruned. Needs a backward pass over `gradient_tokens` calibration tokens, fewer than other methods: they only "
        "weigh a mean. `keep` counts the base too.",
        recipe={**SHARE, "shared_base": "fisher_whitened_deltas", "gradient_tokens": 2048, "fit_tokens": 16_384},
    ),
    "d2-moe-frequency": Preset(
        paper="Delta Decompression for MoE-based LLMs Compression (Gu et al., 2025)",
        url="https://arxiv.org/abs/2502.17298",
        notes="As `d2-moe`, with the base weighted by how often experts are used: no gradients.",
        recipe={**SHARE, "shared_base": "whitened_deltas"},
    ),
    "molae": Preset(
        paper="MoLAE: Mixture of Latent Experts for Parameter-Efficient Language Models (Liu et al., 2025)",
        url="https://arxiv.org/abs/2503.23100",
        notes="Known from an abstract and a summary: one projection in and one out for all experts of a layer, "
        "fitted to the outputs on calibration tokens, without the training that follows there.",
        recipe={**SHARE, "shared_base": "whitened_latent_projection"},
    ),
}
