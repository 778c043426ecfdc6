"""Methods that run the calibration data backward too."""

from .preset import Preset
from .pruning import NARROW

PRESETS = {
    "heapr": Preset(
        paper="HEAPr: Hessian-based Efficient Atomic Expert Pruning in Output Space (Li et al., 2026)",
        url="https://arxiv.org/abs/2509.22299",
        notes="Narrows all experts of a layer alike, by the second-order change of the loss that each neuron stands "
        "for, from `gradient_tokens` calibration tokens. The paper ranks the neurons of all layers together; "
        "layout='mapped' lets those of one layer compete.",
        recipe={"layout": "native", **NARROW, "selection": "atomic_experts"},
    ),
    "m-smoe-fisher": Preset(
        paper="Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy (Li et al., 2024)",
        url="https://arxiv.org/abs/2310.01334",
        notes="m-smoe with Fisher merging, an ablation of the paper that did worse there. Gradients are squared token "
        "by token, not sample by sample, over `gradient_tokens` calibration tokens.",
        recipe={"merging": "fisher"},
    ),
}
