"""From a path, a Hub id or a configuration to a configuration, a weightless model, a loaded model or a tokenizer."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from .modeling.merged_model import known_classes
from .registry import closest

MERGED_MODEL_TYPE = "merged_sparse_moe"
# Where nothing names a class, the first of these that knows the configuration decides.
AUTO_CLASSES = (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForImageTextToText,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForMultimodalLM,
)
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def read_config(source: str | os.PathLike | PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model, without its weights.

    Args:
        source: A configuration (returned as it is), a folder with `config.json`, a `.json` file, or a Hub id.
        trust_remote_code: Run the configuration's own Python file, if it has one.

    Raises:
        FileNotFoundError: No such folder or file, no configuration in it, or no such model on the Hub.
        ValueError: A model type that neither transformers nor `trust_remote_code` knows.
        TypeError: `source` is none of the above.
    """
    if isinstance(source, PreTrainedConfig):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"A model is a path, a Hub id or a configuration, got {type(source).__name__}. "
            "Give the folder that holds config.json."
        )
    path = Path(source).expanduser()
    if path.exists():
        _check_folder(path)
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if _looks_local(str(source)):
        raise FileNotFoundError(f"There is no folder or file {str(source)!r}.{_near_path(path)}")
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(
            f"{str(source)!r} is no folder here, and no model of that name was found in the cache or on the Hub."
            f"{_near_path(path)} Check the name, HF_TOKEN and the connection: {str(error).splitlines()[0]}"
        ) from error


def _check_folder(path: Path) -> None:
    """Refuse a folder without a configuration, saying what lies in it or below it instead."""
    if path.is_file() or (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{str(path)!r} holds a PEFT adapter, not a model: no config.json. "
            "Merge the adapter into its base model (merge_and_unload) and save that."
        )
    below = sorted(str(found.parent) for found in path.glob("*/config.json"))
    hint = f" There is one in {', '.join(below[:5])}." if below else " Give the folder that holds it."
    raise FileNotFoundError(f"{str(path)!r} has no config.json.{hint}")


def _looks_local(source: str) -> bool:
    # A Hub id is "name" or "owner/name", nothing else.
    return source.startswith((".", "~", os.sep)) or source.count("/") > 1 or source.endswith(".json")


def _near_path(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return closest(path.name, siblings)


def native_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that the configuration is for.

    It is the class named by `architectures`, else the default of the first Auto class that knows the
    configuration. For a mapped checkpoint it is the class of the original model.

    Raises:
        ValueError: transformers has no class for it.
    """
    name, config = _architecture(config)
    named = getattr(transformers, name, None) if name else None
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    classes = [one for auto_class in AUTO_CLASSES for one in known_classes(auto_class, type(config))]
    # An Auto class may also offer the text half of a multimodal model; the whole comes first.
    for one in [*(one for one in classes if one.config_class is type(config)), *classes]:
        return one
    raise ValueError(
        f"transformers {transformers.__version__} has no model class for the configuration "
        f"{type(config).__name__} (architectures: {name or 'none'}). Upgrade transformers, or pass "
        "trust_remote_code=True if the model brings its own code."
    )


def _architecture(config: PreTrainedConfig) -> tuple[str | None, PreTrainedConfig]:
    """(class name, configuration) of the original model."""
    if config.model_type == MERGED_MODEL_TYPE:
        if config.base_config is None:
            raise ValueError(
                "The configuration is a request for compress_moe, it describes no model. "
                "Give the configuration of a compressed checkpoint or of an original model."
            )
        return config.base_architecture, config.base_config
    return (config.architectures or [None])[0], config


def auto_class_of(config: PreTrainedConfig) -> type | None:
    """The Auto class that loads the model with the head its configuration names; None if no Auto class does."""
    model_class = native_class(config)
    _, base_config = _architecture(config)
    for auto_class in AUTO_CLASSES:
        if model_class in known_classes(auto_class, type(base_config)):
            return auto_class
    return None


def _remote_class_of(config: PreTrainedConfig) -> type | None:
    """The Auto class under which a configuration names its own Python code."""
    auto_map = getattr(config, "auto_map", None) or {}
    if config.model_type == MERGED_MODEL_TYPE:
        return None  # its code is this package
    return next((one for one in AUTO_CLASSES if one.__name__ in auto_map), None)


def config_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a configuration says the weights have; float32 where it says nothing."""
    _, base_config = _architecture(config)
    owners = (config, base_config, base_config.get_text_config())
    dtype = next((owner.dtype for owner in owners if owner.dtype is not None), torch.float32)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def empty_model(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration on the meta device: names, shapes and dtypes, but no memory for weights.

    Dtypes are those that `from_pretrained` gives, including the parts that a model keeps in float32.

    Args:
        config: Any configuration, that of a mapped checkpoint included. It is copied, because building from a
            live one resets the attention implementation of the model it belongs to.
        trust_remote_code: Run the model's own Python file, if it has one.

    Raises:
        ValueError: transformers has no class for it.
    """
    config = copy.deepcopy(config)
    dtype = config_dtype(config)
    remote_class = _remote_class_of(config) if trust_remote_code else None
    with torch.device("meta"):
        if remote_class is not None:
            model = remote_class.from_config(config, dtype=dtype, trust_remote_code=True)
        elif config.model_type == MERGED_MODEL_TYPE:
            model = (auto_class_of(config) or AutoModel).from_config(config, dtype=dtype)
        else:
            model_class = native_class(config)
            is_text_half = model_class.config_class is type(config.get_text_config())
            model = model_class._from_config(config.get_text_config() if is_text_half else config, dtype=dtype)
    _keep_in_float32(model, dtype)
    return model.eval()


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the tensors that `from_pretrained` keeps in float32 that dtype, which `from_config` does not."""
    patterns = set()
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    if not patterns:
        return
    expression = re.compile("|".join(pattern.replace("*", r".*") for pattern in patterns))
    for module_name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor.dtype == dtype and expression.search(f"{module_name}.{name}"):
                wide = tensor.to(torch.float32)
                setattr(module, name, nn.Parameter(wide, tensor.requires_grad) if name in module._parameters else wide)


def load_model(
    path: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model with the head that its configuration names, original or compressed.

    Args:
        path: Folder or Hub id.
        dtype: Of the weights; "auto" takes that of the checkpoint.
        device_map: As for `from_pretrained`, e.g. "auto".
        trust_remote_code: Run the model's own Python file, if it has one.
        kwargs: More arguments for `from_pretrained`.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: No such model, or no weights in its folder.
        ValueError: transformers has no class for it.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    path = Path(path).expanduser() if Path(path).expanduser().exists() else str(path)
    remote_class = _remote_class_of(config) if trust_remote_code else None
    loader = remote_class or auto_class_of(config)
    if loader is None:  # a part of a larger model: `AutoModel` knows what was compressed, but not the original
        loader = AutoModel if config.model_type == MERGED_MODEL_TYPE else native_class(config)
    # Class models know no trust_remote_code; only what needs it may get it.
    kwargs.update({"trust_remote_code": True} if remote_class is not None else {})
    return loader.from_pretrained(path, dtype=dtype, device_map=device_map, **kwargs)


def load_tokenizer(
    path: str | os.PathLike, *, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model; None when the folder or repository has no tokenizer file.

    Args:
        path: Folder or Hub id of a model.
        trust_remote_code: Run the tokenizer's own Python file, if it has one.
        kwargs: More arguments for `AutoTokenizer.from_pretrained`.
    """
    local = Path(path).expanduser()
    if local.is_file():
        local = local.parent
    if local.is_dir():
        path, has_file = local, any((local / name).is_file() for name in TOKENIZER_FILES)
    else:
        has_file = any(
            cached_file(str(path), name, _raise_exceptions_for_missing_entries=False) is not None
            for name in TOKENIZER_FILES
        )
    if not has_file:
        return None
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
