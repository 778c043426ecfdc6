"""Mapped causal models in vLLM, on its transformers backend (written against vLLM 0.33). Imports vLLM.

Attention, projections, norms and embeddings become vLLM's, as for every model of that backend. The experts stay the
modules of this package with their maps: any number of experts per layer and any form of them. So they run by
transformers' grouped products, not by vLLM's fused kernels, which know one number of experts for all layers and as
many router rows; with tensor parallelism every rank holds all experts.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from vllm.model_executor.models.transformers import TransformersForCausalLM


class MergedSparseMoeForVllm(TransformersForCausalLM):
    """A mapped causal language model. Its dense base class leaves experts alone, which is what their maps need.

    Raises:
        ValueError: Experts that are no dense matrices in compiled mode: where they start is read on the host.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        model_config = vllm_config.model_config
        forms = {layout["form"] for layout in model_config.hf_config.layers.values() if layout.get("form")}
        if forms and not model_config.enforce_eager:
            raise ValueError(
                f"The checkpoint has experts of the form {', '.join(sorted(forms))}, which cannot be compiled. Use "
                "--enforce-eager, or export it: hf-mcsmoe export DIR --layout native --output OUT."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _create_model(self) -> PreTrainedModel:
        """The base model without head, parameters on the meta device and all buffers on the real one."""
        model = super()._create_model()
        # vLLM writes settings into the text configuration later on, and the model has a copy of its own.
        self.text_config = model.config.get_text_config()
        # It fills parameters on the meta device, not buffers: maps and offsets would stay empty.
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device_config.device)
        return model
