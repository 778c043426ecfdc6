"""What a recipe makes of a model that is only described, for a share or for a budget."""

import os

from transformers import PreTrainedConfig, PreTrainedModel

from .fitting import resolve_fit
from .loading import empty_model, read_config
from .model_plan import ModelPlan, plan_of_share
from .recipe import Recipe


def plan(
    model: PreTrainedModel | PreTrainedConfig | str | os.PathLike, recipe: Recipe, *, trust_remote_code: bool = False
) -> ModelPlan:
    """What a recipe makes of a model, without weights and without running anything.

    Bytes are those of the tensors that the checkpoint will hold, in the dtype that the model has or that its
    configuration says. Mapped layout: M experts a layer, and an int64 map with an entry per slot. Native layout: M
    experts and M router rows. What `Sizes` says about decomposed experts is in `expert_size`.

    Args:
        model: A model on any device, a configuration, a folder or a Hub id.
        recipe: What is asked. For "auto" the sizes are those of its first candidate that the model can have; all
            have the same budget.
        trust_remote_code: Run the model's own Python file, if it has one.

    Raises:
        FileNotFoundError: No such model.
        ValueError: The recipe cannot be planned for this model, see `check_layout`.
    """
    if not isinstance(model, PreTrainedModel):
        config = read_config(model, trust_remote_code=trust_remote_code)
        model = empty_model(config, trust_remote_code=trust_remote_code)
    return plan_of_share(model, resolve_fit(model, recipe)[0])
