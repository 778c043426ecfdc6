"""M-SMoE and MC-SMoE."""

from .preset import Preset

PRESETS = {
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
}
