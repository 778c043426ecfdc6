"""Model classes of the mapped layout: one subclass per original architecture, made on demand.

`model.config` stays the configuration of the original architecture plus one attribute, `merged_sparse_moe`;
only `config.json` on disk is a `MergedSparseMoeConfig`. So everything that transformers, Accelerate and PEFT do
by class and configuration keeps working.
"""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import CommitInfo
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.modeling_auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ..config import MergedSparseMoeConfig
from ..local_paths import without_paths
from .build_layers import build_merged_layers
from .offload import offloaded_state_dict
from .shim import SHIM, SHIM_NAME


class MergedMoeMixin:
    """What a mapped model adds to the class of its original architecture."""

    saves_original_format = False  # whether save_pretrained stores tensors like the original architecture does

    # PreTrainedModel treats classes outside of transformers as custom code and then skips the family's
    # checkpoint conversions.
    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the class is the original one with fewer experts."""
        return False

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        build_merged_layers(self, config.merged_sparse_moe["layers"])

    def merged_config(self) -> MergedSparseMoeConfig:
        """What `config.json` says: the layout around a copy of the original architecture's configuration."""
        # A copy, because building a configuration around a live one resets its attention implementation.
        base_config = copy.deepcopy(self.config)
        layout = base_config.__dict__.pop("merged_sparse_moe")
        base_config.architectures = [layout["base_architecture"]]
        base_config._name_or_path = ""  # a path of this machine
        layout["provenance"] = without_paths(layout["provenance"])
        config = MergedSparseMoeConfig(base_config=base_config, **layout)
        dispatcher = dispatcher_of(type(self))
        config.architectures = [dispatcher.__name__]
        config.dtype = self.config.dtype
        config.auto_map = {"AutoConfig": f"{SHIM_NAME}.MergedSparseMoeConfig"}
        for one in DISPATCHERS:
            config.auto_map[one.auto_class.__name__] = f"{SHIM_NAME}.{one.__name__}"
        return config

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """`PreTrainedModel.save_pretrained`, with the configuration and the loading shim of the mapped layout.

        Tensors keep the names they have in the model, so that Trainer can resume: it looks for these names only,
        and leaves experts that a checkpoint stores one by one as they are. Nor could the format of Ernie 4.5 VL,
        one list of experts for two layers, hold different numbers of them.
        """
        kwargs.setdefault("save_original_format", self.saves_original_format)
        hub_arguments = ("repo_id", "commit_message", "private", "create_pr", "revision")
        hub = {name: kwargs.pop(name) for name in hub_arguments if name in kwargs and push_to_hub}
        state_dict = offloaded_state_dict(self) if state_dict is None else state_dict
        super().save_pretrained(save_directory, is_main_process, state_dict, False, **kwargs)
        folder = Path(save_directory)
        if is_main_process and (folder / "config.json").exists():
            self.merged_config().save_pretrained(folder)
            (folder / f"{SHIM_NAME}.py").write_text(SHIM, encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", folder.resolve().name), token=kwargs.get("token"), **hub)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload the model with report, recipe and generated card in one commit: see `hf_mcsmoe.push_to_hub`.

        Args:
            repo_id: "owner/name", or "name" for a repository of one's own.
            options: Those of `hf_mcsmoe.push_to_hub`, `tokenizer` among them, which are those of
                `PreTrainedModel.push_to_hub` and more.
        """
        from ..publishing.hub import push_to_hub  # here, because publishing is built on models

        return push_to_hub(self, repo_id, **options)


def merged_class(native_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The mapped version of a model class of transformers, made once and kept in this module."""
    name = f"Merged{native_class.__name__}"
    module = sys.modules[__name__]
    if not hasattr(module, name):
        made = type(
            name,
            (MergedMoeMixin, native_class, dispatcher_of(native_class)),
            {
                "__module__": __name__,
                "__doc__": f"`{native_class.__name__}` whose experts were compressed by hf_mcsmoe.",
                "config_class": native_class.config_class,
                # PreTrainedModel looks for the decorator of the experts in the source of the class's module.
                "_can_set_experts_implementation_cached_value": native_class._can_set_experts_implementation(),
            },
        )
        mapping = get_checkpoint_conversion_mapping(native_class.__name__)
        if mapping is not None:  # conversions may be keyed by class name
            register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
        list_by_name(native_class, name)
        setattr(module, name, made)
    return getattr(module, name)


def list_by_name(native_class: type[PreTrainedModel], name: str) -> None:
    """Add the class `name` to the tables of class names that have `native_class`.

    Trainer decides by them whether label smoothing shifts the labels, and pipelines which models they take.
    """
    for dispatcher in DISPATCHERS:
        names = dispatcher.auto_class._model_mapping._model_mapping
        listed = [one for entry in names.values() for one in (entry if isinstance(entry, tuple) else (entry,))]
        if native_class.__name__ in listed:
            # The key is no model type, so the Auto classes themselves never look at it.
            names[f"{MergedSparseMoeConfig.model_type}/{name}"] = name


class MergedSparseMoeDispatcher:
    """Stands for "the mapped version of whatever architecture the checkpoint has" in one Auto class."""

    config_class = MergedSparseMoeConfig
    auto_class: type

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: a checkpoint names this package in `auto_map`."""

    @classmethod
    def native_class(cls, config: MergedSparseMoeConfig) -> type[PreTrainedModel]:
        """The class of transformers that this Auto class would build for the base model."""
        if config.base_config is None:
            raise ValueError(
                "The configuration is a request for compress_moe, it describes no model. "
                "Compress a model with it first, or load the configuration of a compressed checkpoint."
            )
        by_name = {one.__name__: one for one in known_classes(cls.auto_class, type(config.base_config))}
        if config.base_architecture in by_name:
            return by_name[config.base_architecture]
        unlisted = unlisted_class(config) if cls is MergedSparseMoeModel else None
        if unlisted is not None:
            return unlisted
        if by_name:
            return next(iter(by_name.values()))
        raise ValueError(
            f"{cls.auto_class.__name__} has no model for {type(config.base_config).__name__}. "
            f"The checkpoint was made from {config.base_architecture}; load it with the Auto class for that."
        )

    @staticmethod
    def native_config(config: MergedSparseMoeConfig) -> PreTrainedConfig:
        """The base model's configuration with the layout in its attribute `merged_sparse_moe`."""
        native = copy.deepcopy(config.base_config)
        if config.dtype is not None:
            native.dtype = config.dtype
        names = ("recipe", "base_architecture", "layers", "provenance", "format_version")
        native.merged_sparse_moe = {name: getattr(config, name) for name in names}
        return native

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *args: Any, config: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Load a mapped checkpoint; arguments as for `PreTrainedModel.from_pretrained`."""
        if config is None:
            config, kwargs = MergedSparseMoeConfig.from_pretrained(path, return_unused_kwargs=True, **kwargs)
        model_class = merged_class(cls.native_class(config))
        return model_class.from_pretrained(path, *args, config=cls.native_config(config), **kwargs)

    @classmethod
    def _from_config(cls, config: MergedSparseMoeConfig, **kwargs: Any) -> PreTrainedModel:
        """Build with random weights, as `AutoModel.from_config` does."""
        return merged_class(cls.native_class(config))._from_config(cls.native_config(config), **kwargs)


class MergedSparseMoeModel(MergedSparseMoeDispatcher):
    """Mapped checkpoints for `AutoModel`: the base model without a head."""

    auto_class = AutoModel


class MergedSparseMoeForCausalLM(MergedSparseMoeDispatcher):
    """Mapped checkpoints for `AutoModelForCausalLM`."""

    auto_class = AutoModelForCausalLM


class MergedSparseMoeForSeq2SeqLM(MergedSparseMoeDispatcher):
    """Mapped checkpoints for `AutoModelForSeq2SeqLM`."""

    auto_class = AutoModelForSeq2SeqLM


class MergedSparseMoeForImageTextToText(MergedSparseMoeDispatcher):
    """Mapped checkpoints for `AutoModelForImageTextToText`."""

    auto_class = AutoModelForImageTextToText


class MergedSparseMoeForSequenceClassification(MergedSparseMoeDispatcher):
    """Mapped checkpoints for `AutoModelForSequenceClassification`."""

    auto_class = AutoModelForSequenceClassification


class MergedSparseMoeForTokenClassification(MergedSparseMoeDispatcher):
    """Mapped checkpoints for `AutoModelForTokenClassification`."""

    auto_class = AutoModelForTokenClassification


class MergedSparseMoeForMultimodalLM(MergedSparseMoeDispatcher):
    """Mapped checkpoints for `AutoModelForMultimodalLM`."""

    auto_class = AutoModelForMultimodalLM


# The order decides where an architecture that several Auto classes know belongs.
DISPATCHERS = (
    MergedSparseMoeForCausalLM,
    MergedSparseMoeForSeq2SeqLM,
    MergedSparseMoeForImageTextToText,
    MergedSparseMoeForSequenceClassification,
    MergedSparseMoeForTokenClassification,
    MergedSparseMoeForMultimodalLM,
    MergedSparseMoeModel,
)


def known_classes(auto_class: type, config_class: type[PreTrainedConfig]) -> tuple[type[PreTrainedModel], ...]:
    """The models that an Auto class builds for a configuration class, its default first."""
    known = auto_class._model_mapping.get(config_class, None)
    return tuple(known) if isinstance(known, tuple | list) else (known,) if known is not None else ()


def unlisted_class(config: MergedSparseMoeConfig) -> type[PreTrainedModel] | None:
    """The class that was compressed, if no Auto class of `DISPATCHERS` lists it (half of a multimodal model, ...)."""
    named = getattr(transformers, config.base_architecture, None)
    listed = [x for one in DISPATCHERS for x in known_classes(one.auto_class, type(config.base_config))]
    is_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
    return named if is_model and named not in listed else None


def dispatcher_of(model_class: type[PreTrainedModel]) -> type[MergedSparseMoeDispatcher]:
    """The dispatcher whose Auto class knows `model_class`, original or mapped."""
    for dispatcher in DISPATCHERS:
        known = known_classes(dispatcher.auto_class, model_class.config_class)
        if any(issubclass(model_class, one) for one in known):
            return dispatcher
    return MergedSparseMoeModel


AutoConfig.register(MergedSparseMoeConfig.model_type, MergedSparseMoeConfig)
for _dispatcher in DISPATCHERS:
    _dispatcher.auto_class.register(MergedSparseMoeConfig, _dispatcher)
