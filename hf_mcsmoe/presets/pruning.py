"""Experts that are dropped, by one score or another; what stays, stays as it is."""

from .preset import Preset

DROP = {"allocation": "uniform", "similarity": None, "grouping": "drop", "alignment": None, "merging": None}
# Neurons go, whole experts stay.
NARROW = {**DROP, "saliency": "usage_frequency"}

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
    "ean": Preset(
        paper="Expert activation norm, a baseline of REAP the Experts (Lasby et al., 2025)",
        url="https://arxiv.org/abs/2510.13999",
        notes="Keeps the experts whose outputs, without the gates, add up to the largest norms.",
        recipe={"layout": "native", **DROP, "saliency": "total_output_norm"},
    ),
    "man": Preset(
        paper="MAN, mean activation norm, of task-agnostic expert pruning (2026)",
        url="https://arxiv.org/abs/2606.15716",
        notes="Keeps the experts whose outputs are largest where they are used; neither gate nor frequency counts. "
        "Only the abstract of the paper was read.",
        recipe={"layout": "native", **DROP, "saliency": "output_norm"},
    ),
    "msan": Preset(
        paper="MSAN, mean squared activation norm, of task-agnostic expert pruning (2026)",
        url="https://arxiv.org/abs/2606.15716",
        notes="Like man, with squared norms. Only the abstract of the paper was read.",
        recipe={"layout": "native", **DROP, "saliency": "squared_output_norm"},
    ),
    "easy-ep": Preset(
        paper="EASY-EP: domain-specific pruning of large MoE models with few-shot demonstrations (2025)",
        url="https://arxiv.org/abs/2504.06792",
        notes="Keeps the experts that give most to the tokens whose residual stream the layer turns. The calibration "
        "data are the demonstrations of the domain; scaling each of several domains by itself is left out.",
        recipe={"layout": "native", **DROP, "saliency": "residual_change"},
    ),
    "mone": Preset(
        paper="MoNE: Replacing Redundant Experts with Lightweight Novices (Zhang et al., 2026)",
        url="https://arxiv.org/abs/2507.00390",
        notes="Drops the experts of least output variance times use; their slots add their mean output, so the gates "
        "stay those of the original model. constants='gate_weighted_mean' has the least squared error instead.",
        recipe={**DROP, "saliency": "output_variance", "constants": "routed_mean"},
    ),
    "naee": Preset(
        paper="Not All Experts are Equal: Efficient Expert Pruning and Skipping for MoE LLMs (Lu et al., 2024)",
        url="https://arxiv.org/abs/2402.14800",
        notes="Tries all subsets of a layer's experts where there are at most 1000, else lets experts go one by one; "
        "on about 8192 calibration tokens. sequential=True is the paper's progressive variant. Skipping experts of a "
        "token is no compression and left out.",
        recipe={"layout": "native", **DROP, "grouping": "subset_search"},
    ),
    "camera-p": Preset(
        paper="CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis (Xu et al., "
        "2025)",
        url="https://arxiv.org/abs/2508.02322",
        notes="Narrows all experts of a layer alike, by the energy and the peak of each neuron. The paper ranks the "
        "neurons of a layer jointly and sets the others to zero: layout='mapped' gives these ragged widths, really "
        "smaller. Shared experts stay whole.",
        recipe={"layout": "native", **NARROW, "selection": "micro_expert_energy", "sequential": True},
    ),
    "premoe": Preset(
        paper="PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval (2025)",
        url="https://arxiv.org/abs/2505.17639",
        notes="Keeps the experts that a task's tokens ask the router for most; the calibration data are the task. "
        "hf_mcsmoe.task_patterns stores patterns of tasks, hf_mcsmoe.partial_loading loads the experts of one alone.",
        recipe={"layout": "native", **DROP, "saliency": "expected_selection"},
    ),
    "random": Preset(
        paper="A control, without a paper",
        url="https://arxiv.org/abs/2310.01334",
        notes="Keeps experts at random: what any score must beat. saliency_options={'seed': 1} draws others.",
        recipe={"layout": "native", **DROP, "saliency": "random"},
    ),
}
