"""As much of vLLM 0.33 as its plug-ins and its transformers backend show without a GPU; written after its source.

What is left out: attention, linear layers and norms stay those of transformers, and nothing is compiled or sharded.
"""

import sys
import types
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModel


class FakeRegistry:
    """`ModelRegistry`: names of classes, imported when they are needed."""

    def __init__(self):
        self.models = {}

    def get_supported_archs(self):
        return self.models.keys()

    def register_model(self, model_arch, model_cls):
        if not isinstance(model_arch, str):
            raise TypeError(f"`model_arch` should be a string, not a {type(model_arch)}")
        if len(model_cls.split(":")) != 2:
            raise ValueError("Expected a string in the format `<module>:<class>`")
        self.models[model_arch] = model_cls


@contextmanager
def parameters_on_meta():
    """Modules made inside get parameters on the meta device and buffers where they would be anyway."""
    register = nn.Module.register_parameter

    def register_empty(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            kept = module._parameters[name]
            module._parameters[name] = type(kept)(kept.to("meta"), requires_grad=kept.requires_grad)

    nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class FakeTransformersForCausalLM(nn.Module):
    """`TransformersForCausalLM`: a base model without head from the configuration, a head, and weights by name."""

    def __init__(self, *, vllm_config, prefix=""):  # noqa: ARG002
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.text_config = self.config.get_text_config()
        self.model_config, self.device_config = vllm_config.model_config, vllm_config.device_config
        self.text_config._attn_implementation = "eager"
        self.config.dtype = torch.get_default_dtype()
        with parameters_on_meta():
            self.model = self._create_model()
        self.text_config._written_later = True
        self.fill_parameters(self.model)
        self.lm_head = nn.Linear(self.text_config.hidden_size, self.text_config.vocab_size, bias=False)

    def _create_model(self):
        trust = self.model_config.trust_remote_code
        return AutoModel.from_config(config=self.config, dtype=self.model_config.dtype, trust_remote_code=trust)

    def fill_parameters(self, module):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                data = torch.full_like(parameter, float("nan"), device=self.device_config.device)
                setattr(module, name, nn.Parameter(data))
        for child in module.children():
            self.fill_parameters(child)

    def load_weights(self, weights):
        """Copy each into the parameter or persistent buffer of its name, of the same size."""
        loaded = set()
        for name, weight in weights:
            owner_name, _, tensor_name = name.rpartition(".")
            owner = self.get_submodule(owner_name)
            if tensor_name in owner._non_persistent_buffers_set:
                raise ValueError(f"There is no module or parameter named {name!r}")
            target = owner._parameters.get(tensor_name, owner._buffers.get(tensor_name))
            assert target.size() == weight.size(), name
            target.data.copy_(weight)
            loaded.add(name)
        return loaded

    def forward(self, input_ids):
        # A row of tokens without a batch dimension, with positions and without a cache.
        positions = torch.arange(len(input_ids))[None]
        with torch.no_grad():
            hidden = self.model(input_ids=input_ids[None], use_cache=False, position_ids=positions, return_dict=False)
            return self.lm_head(hidden[0][0])


def fake_config(hf_config, *, enforce_eager=False, trust_remote_code=False):
    """A `VllmConfig` for a model on the CPU in float32."""
    model_config = types.SimpleNamespace(
        hf_config=hf_config, dtype=torch.float32, trust_remote_code=trust_remote_code, enforce_eager=enforce_eager
    )
    return types.SimpleNamespace(
        model_config=model_config, device_config=types.SimpleNamespace(device=torch.device("cpu"))
    )


def install(monkeypatch):
    """Put the fake in the place of vLLM for one test; returns its registry."""
    registry = FakeRegistry()
    modules = {
        "vllm": {"ModelRegistry": registry},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.transformers": {"TransformersForCausalLM": FakeTransformersForCausalLM},
    }
    for name, values in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hf_mcsmoe.serving.vllm_model", raising=False)
    return registry
