"""MergedSparseMoeConfig: a compression request, and what `config.json` of a mapped checkpoint says."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .recipe import Recipe
from .recipe_reading import RECIPE_FIELDS, recipe_from_dict
from .registry import closest

FORMAT_VERSION = 1
# Keys that transformers itself passes to any configuration or writes into its file.
HOST_KEYS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
        "transformers_weights",
    }
)
OWN_KEYS = frozenset(
    {
        "architectures",
        "auto_map",
        "base_architecture",
        "base_config",
        "format_version",
        "layers",
        "provenance",
        "quantization_config",
        "recipe",
        "transformers_version",
    }
)
# Fields that every configuration has; here they say what the base model's say.
SHARED_FIELDS = tuple(field.name for field in fields(PreTrainedConfig) if field.name not in OWN_KEYS)


class MergedSparseMoeConfig(PreTrainedConfig):
    """Configuration of `compress_moe` and of the mapped checkpoints that it makes.

    As a request it takes the fields of `Recipe` as keyword arguments, as one does with `LoraConfig`:
    `MergedSparseMoeConfig(keep=0.5, allocation="uniform")` or `MergedSparseMoeConfig.from_preset("m-smoe",
    keep=0.5)`; they can be read and set as attributes. As a checkpoint's configuration it holds
    `base_config`, and attributes it lacks itself (`hidden_size`, `vocab_size`, ...) are those of `base_config`.

    Args:
        recipe: Fields of `Recipe` as a mapping; an alternative to giving them as keywords.
        base_config: Configuration of the original architecture (with the original number of experts).
        base_architecture: Class of the original model, e.g. "Qwen3MoeForCausalLM".
        layers: For each compressed layer, by the path of its experts module: `num_experts` (M),
            `num_slots` (N), `has_dropped`, `collapse_duplicates`.
        provenance: What made the checkpoint: base model, calibration fingerprint, versions.
        format_version: Version of this layout.
        kwargs: Fields of `Recipe`, or of `base_config` where there is one.

    Raises:
        ValueError: An unknown key (with the closest match), a recipe that is not allowed, or a checkpoint of
            a newer format than this version of the package reads.
    """

    model_type = "merged_sparse_moe"
    # The fallback type is never used for a real checkpoint, whose base_config names its own.
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="mixtral", optional=True)
    }

    recipe: dict | None = None
    base_config: dict | PreTrainedConfig | None = None
    base_architecture: str | None = None
    layers: dict | None = None
    provenance: dict | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint has format_version {self.format_version}, this hf_mcsmoe reads up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade hf-mcsmoe"
            )
        steps = {name: kwargs.pop(name) for name in list(kwargs) if name in RECIPE_FIELDS and not self.base_config}
        given = self.recipe.to_dict() if isinstance(self.recipe, Recipe) else self.recipe or {}
        self.recipe = {**given, **steps}
        # Host keys are for the base class; what is left must be an attribute of the base model's configuration.
        host = {name: kwargs.pop(name) for name in list(kwargs) if name in HOST_KEYS or name.startswith("_")}
        set_here = [name for name in SHARED_FIELDS if getattr(self, name) != getattr(PreTrainedConfig, name)]
        if host.get("torch_dtype") is not None:  # the old name of dtype
            set_here.append("dtype")
        if isinstance(self.base_config, dict) and not self.base_config.get("model_type"):
            # Parts of some models (the talker of Qwen3-Omni) have no model type; only their class knows them.
            base_class = getattr(transformers, self.base_architecture or "", None)
            self.base_config = base_class.config_class(**self.base_config) if base_class else self.base_config
        super().__post_init__(**host)
        if self.base_config is None:
            self._refuse_unknown(kwargs, RECIPE_FIELDS)
            self._ask(self.recipe)  # a checkpoint's recipe is history: not checked again
            return
        self._share_fields(set_here, host.get("num_labels"))
        for name, value in kwargs.items():
            if not self.base_config._hasattr_without_heterogeneous_validation(name):
                self._refuse_unknown({name: value}, RECIPE_FIELDS)
            setattr(self.base_config, name, value)

    def _share_fields(self, set_here: list[str], num_labels: int | None) -> None:
        """Fields set here go to the base model's configuration, the others come from it."""
        if num_labels is not None:
            self.base_config.num_labels = num_labels
        for name in SHARED_FIELDS:
            if name in set_here:
                setattr(self.base_config, name, getattr(self, name))
            self.__dict__[name] = getattr(self.base_config, name)
        # What the base class derived from the base model's values, such as rope_parameters, stays the base model's.
        declared = {field.name for field in fields(self)}
        for name in [name for name in self.__dict__ if name not in declared and not name.startswith("_")]:
            if name not in OWN_KEYS:
                del self.__dict__[name]

    def _ask(self, values: Mapping[str, Any]) -> None:
        """Check a request and keep it as it was asked: what was left open stays open."""
        recipe = recipe_from_dict(values)
        layers = {"exclude_layers": list(recipe.exclude_layers)} if "exclude_layers" in values else {}
        self.recipe = {**values, **layers}

    def _refuse_unknown(self, kwargs: dict[str, Any], known: frozenset[str]) -> None:
        for name in kwargs:
            raise ValueError(
                f"MergedSparseMoeConfig has no key {name!r}; a recipe has {sorted(known)}.{closest(name, known)} "
                "If the file was written by a newer version: pip install --upgrade hf-mcsmoe"
            )

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> "MergedSparseMoeConfig":
        """The request for a published method, with some fields of its recipe changed; see `recipe.PRESETS`."""
        return cls(recipe={"preset": preset, **changes})

    def to_recipe(self) -> Recipe:
        """The recipe as a checked value."""
        return recipe_from_dict(self.recipe)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: a checkpoint names this package in `auto_map`, no source file is copied into it."""

    # Everything that asks a checkpoint's configuration for the shape of the model means the base model's.

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__
        base = values.get("base_config")
        if not name.startswith("_") and isinstance(base, PreTrainedConfig):
            try:
                return getattr(base, name)
            except RuntimeError as error:  # per-layer values raise this; hasattr() must see an AttributeError
                raise AttributeError(name) from error
        if base is None and name in RECIPE_FIELDS and values.get("recipe") is not None:
            return getattr(recipe_from_dict(values["recipe"]), name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base_config")
        if base is None and name in RECIPE_FIELDS:
            self._ask({**(self.recipe or {}), name: value})
            return
        is_ready = self.__dict__.get("_post_init_done") and not name.startswith("_")
        if base is None and is_ready and not hasattr(type(self), name) and name not in OWN_KEYS | HOST_KEYS:
            self._refuse_unknown({name: value}, RECIPE_FIELDS)
        # While the base class initialises itself it sets defaults, which must not overwrite the base model's values.
        forwards = is_ready and name not in OWN_KEYS
        if forwards and isinstance(base, PreTrainedConfig) and base._hasattr_without_heterogeneous_validation(name):
            setattr(base, name, value)
            if name not in self.__dict__ and not hasattr(type(self), name):
                return
        super().__setattr__(name, value)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The text configuration of the base model; this configuration itself while it is a request."""
        return self if self.base_config is None else self.base_config.get_text_config(*args, **kwargs)

    def validate(self) -> None:
        """Nothing to validate here: `base_config` validates itself, and the recipe was checked when it was set."""

    validate_architecture = validate_layer_type = validate_token_ids = validate_output_attentions = validate
