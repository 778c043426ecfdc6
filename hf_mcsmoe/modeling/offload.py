"""Reading and replacing tensors that Accelerate keeps off the execution device (on the CPU or on disk)."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, align_module_device, has_offloaded_params
from accelerate.utils.modeling import get_state_dict_offloaded_model
from safetensors.torch import save_file
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
    written in the offload folder; no file that was there before is touched.
    """
    kept = value.detach()
    is_parameter = name in module._parameters
    if has_offloaded_params(module):
        hook = module._hf_hook
        # The store may hold buffers too, even those that stay on the device.
        if name in hook.weights_map:
            _replace_in_store(hook.weights_map, name, kept)
        if is_parameter or hook.offload_buffers:
            kept = kept.to("meta")
    if is_parameter:
        requires_grad = module._parameters[name].requires_grad
        module._parameters[name] = nn.Parameter(kept, requires_grad=requires_grad)
    else:
        module._buffers[name] = kept


def add_tensor(module: nn.Module, name: str, value: Tensor, requires_grad: bool | None) -> None:
    """Give `module` a new direct parameter or buffer, kept where its other tensors are kept.

    Args:
        module: The module.
        name: Not used by any of its tensors.
        value: On the device where the module computes.
        requires_grad: Of the parameter; None makes it a buffer.
    """
    is_parameter = requires_grad is not None
    hook = getattr(module, "_hf_hook", None)
    if has_offloaded_params(module) and (is_parameter or hook.offload_buffers):
        _replace_in_store(hook.weights_map, name, value)
        hook.original_devices[name] = torch.device("cpu")
        value = value.to("meta")
    if is_parameter:
        module.register_parameter(name, nn.Parameter(value, requires_grad=requires_grad))
    else:
        module.register_buffer(name, value)


def remove_tensor(module: nn.Module, name: str) -> None:
    """Take a direct parameter or buffer out of `module`, and out of the store that it is offloaded to.

    Files on disk stay: another model may read them.
    """
    delattr(module, name)
    if has_offloaded_params(module):
        module._hf_hook.original_devices.pop(name, None)
        _remove_from_store(module._hf_hook.weights_map, name)


def offloaded_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """All tensors of a model, on the CPU, where `save_pretrained` would not find them itself; else None.

    transformers looks for offloaded weights only in models with a device map, and Accelerate's `cpu_offload` and
    `disk_offload` leave none.
    """
    is_offloaded = any(has_offloaded_params(module) for module in model.modules())
    if not is_offloaded or hasattr(model, "hf_device_map"):
        return None
    return get_state_dict_offloaded_model(model)


def _replace_in_store(store: Any, name: str, value: Tensor) -> None:
    """Write into the mapping that an Accelerate hook reads its weights from."""
    if isinstance(store, PrefixedDataset):
        _replace_in_store(store.dataset, f"{store.prefix}{name}", value)
    elif not isinstance(store, OffloadedWeightsLoader):
        store[name] = value.cpu()
    elif name in store.state_dict or store.save_folder is None:
        store.state_dict[name] = value.cpu()  # comes before what the index says
    else:
        # Its own file: another model may still read the one that the index names, or a checkpoint.
        handle, path = tempfile.mkstemp(".safetensors", f"{name}.", store.save_folder)
        os.close(handle)
        save_file({name: value.cpu().contiguous()}, path)
        dtype = str(value.dtype).removeprefix("torch.")
        store.index[name] = {"safetensors_file": path, "weight_name": name, "dtype": dtype}
    if isinstance(store, OffloadedWeightsLoader) and name not in store.all_keys:
        store.all_keys.append(name)


def _remove_from_store(store: Any, name: str) -> None:
    """Let the mapping that an Accelerate hook reads its weights from forget a tensor."""
    if isinstance(store, PrefixedDataset):
        _remove_from_store(store.dataset, f"{store.prefix}{name}")
    elif not isinstance(store, OffloadedWeightsLoader):
        store.pop(name, None)
    else:
        store.state_dict.pop(name, None)
        store.index.pop(name, None)
        store.all_keys = [key for key in store.all_keys if key != name]
