"""Reading and replacing tensors that Accelerate keeps off the execution device (on the CPU or on disk)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import PrefixedDataset, align_module_device, has_offloaded_params, offload_weight
from torch import Tensor, nn


@contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """Within the context every parameter of `module` (children included) is on a real device.

    Offloaded weights are put back afterwards; changes made to them inside are lost, see `replace_tensor`.
    """
    offloaded = [child for child in module.modules() if has_offloaded_params(child)]
    contexts = [align_module_device(child) for child in offloaded]
    entered = []
    try:
        for context in contexts:
            context.__enter__()
            entered.append(context)
        yield
    finally:
        for context in reversed(entered):
            context.__exit__(None, None, None)


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes: its hook's device if Accelerate dispatched it, else that of its tensors."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    tensor = next(module.parameters(), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def replace_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` (any shape) in the place of the direct parameter or buffer `name`, wherever it is kept.

    Call it outside of `fetched`. An offloaded tensor is replaced in its store: on disk a new file is
    written in the offload folder; checkpoint files are never touched.
    """
    is_parameter = name in module._parameters
    if is_parameter and has_offloaded_params(module):
        _replace_in_store(module._hf_hook.weights_map, name, value.detach())
        kept = value.detach().to("meta")
    else:
        kept = value.detach()
    if is_parameter:
        requires_grad = module._parameters[name].requires_grad
        module._parameters[name] = nn.Parameter(kept, requires_grad=requires_grad)
    else:
        module._buffers[name] = kept


def _replace_in_store(store: object, name: str, value: Tensor) -> None:
    """Write into the mapping that an Accelerate hook reads its weights from."""
    if isinstance(store, PrefixedDataset):
        return _replace_in_store(store.dataset, f"{store.prefix}{name}", value)
    if hasattr(store, "state_dict") and hasattr(store, "index"):  # accelerate's OffloadedWeightsLoader
        if name in store.index and name not in store.state_dict:
            store.index[name] = {}  # drops a reference into the original safetensors file
            offload_weight(value.contiguous(), name, store.save_folder, index=store.index)
            return None
        store.state_dict[name] = value.cpu()
        return None
    store[name] = value.cpu()
    return None
