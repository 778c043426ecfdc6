"""The largest result that fits a memory budget, from the configuration alone."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .families import find_layers
from .layer_budget import FIT, parse_bytes
from .loading import empty_model
from .model_plan import plan_of_share
from .recipe import Recipe
from .recipe_reading import recipe_from_dict

RESOLUTION = 512  # `keep` is a multiple of 1 / RESOLUTION
CONTEXT_LENGTH = 4096


@dataclass(frozen=True)
class Fit:
    """What was chosen for a budget; sizes in bytes."""

    recipe: Recipe
    budget: int
    weights: int
    cache: int  # keys, values and states of all tokens of all rows
    activations: int  # an allowance for one forward over them
    context_length: int
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """What was asked, and why the number was chosen: plain values, ready for JSON."""
        values = {name: value for name, value in asdict(self).items() if name != "recipe"}
        return {"keep": self.recipe.keep, **values, "reason": str(self)}

    def __str__(self) -> str:
        total = self.weights + self.cache + self.activations
        rows = f"{self.batch_size} x {self.context_length} tokens"
        return (
            f"keep={self.recipe.keep:.4g} is the most that fits {gigabytes(self.budget)}: weights "
            f"{gigabytes(self.weights)}, cache of {rows} {gigabytes(self.cache)}, activations about "
            f"{gigabytes(self.activations)}, together {gigabytes(total)}."
        )


def gigabytes(size: int) -> str:
    """Bytes in powers of ten."""
    return f"{size / 1e9:.4g} GB"


def resolve_fit(
    model: PreTrainedModel, recipe: Recipe, *, dtype: str | torch.dtype = "auto"
) -> tuple[Recipe, Fit | None]:
    """A recipe with a number for `keep`, and how it was found where the recipe says `keep="fit"`.

    Args:
        model: On any device; the meta device is enough.
        recipe: Any; without `keep="fit"` it comes back as it is.
        dtype: That the model will be loaded in; "auto" for its own.

    Raises:
        ValueError: See `fit_recipe`.
    """
    if recipe.keep != FIT:
        return recipe, None
    if dtype != "auto":
        config = copy.deepcopy(model.config)
        config.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = empty_model(config)
    how = {"context_length": recipe.context_length or CONTEXT_LENGTH, "batch_size": recipe.rows or 1}
    found = fit_recipe(model, recipe, recipe.fit, **how)
    return found.recipe, found


def fit_recipe(
    model: PreTrainedModel,
    recipe: Recipe,
    budget: int | str,
    *,
    context_length: int = CONTEXT_LENGTH,
    batch_size: int = 1,
) -> Fit:
    """The recipe with the largest `keep` whose result fits a budget with its cache and activations.

    Weights are what `plan` says. The cache is measured: the model runs without weights, and what it keeps for its
    next token is counted, so sliding windows, latent attention and states are what they are. Activations are an
    allowance, see `activation_bytes`.

    Args:
        model: On any device; the meta device is enough.
        recipe: What is asked; its `keep` or `num_experts` does not matter.
        budget: Bytes, or a text such as "24GB".
        context_length: Tokens of a row, prompt and answer together.
        batch_size: Rows at a time.

    Raises:
        ValueError: The smallest result does not fit, a number is out of range, or the recipe cannot be planned.
    """
    budget = parse_bytes(budget)
    for name, value in (("context_length", context_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1. Leave it out for the default.")
    cache = cache_bytes(model, context_length, batch_size)
    activations = activation_bytes(model, context_length * batch_size)
    room = budget - cache - activations
    low, high = smallest_step(model, recipe), RESOLUTION
    smallest = planned_bytes(model, recipe, low)
    if smallest > room:
        raise ValueError(
            f"The budget is {gigabytes(budget)}, but the smallest result takes {gigabytes(smallest)} of weights, "
            f"{gigabytes(cache)} of cache and about {gigabytes(activations)} of activations. Give more memory, a "
            "shorter context, a smaller batch, or a recipe that stores less."
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if planned_bytes(model, recipe, middle) <= room else (low, middle - 1)
    chosen = with_keep(recipe, low)
    weights = planned_bytes(model, recipe, low)
    return Fit(chosen, budget, weights, cache, activations, context_length, batch_size)


def with_keep(recipe: Recipe, step: int) -> Recipe:
    """The recipe with `keep` at so many steps of the resolution."""
    budget = ("keep", "num_experts", "fit", "context_length", "rows")
    values = {name: value for name, value in recipe.to_dict().items() if name not in budget}
    return recipe_from_dict({**values, "keep": step / RESOLUTION})


def planned_bytes(model: PreTrainedModel, recipe: Recipe, step: int) -> int:
    """Bytes of all weights of the result."""
    return plan_of_share(model, with_keep(recipe, step)).total_bytes_after


def smallest_step(model: PreTrainedModel, recipe: Recipe) -> int:
    """The smallest share that the model can have: native routers need as many experts as they choose.

    Raises:
        ValueError: It cannot even have all of them.
    """
    low, high = 1, RESOLUTION
    plan_of_share(model, with_keep(recipe, high))  # raises
    while low < high:
        middle = (low + high) // 2
        try:
            plan_of_share(model, with_keep(recipe, middle))
            high = middle
        except ValueError:
            low = middle + 1
    return low


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, context_length: int, batch_size: int) -> int:
    """What the model keeps of `batch_size` rows of `context_length` tokens for the token after them, in bytes.

    A copy without weights runs on the meta device, where tensors have shapes and no memory.

    Raises:
        ValueError: The model keeps nothing of the kind: it predicts no next token.
    """
    skeleton = empty_model(model.config)
    for layer in find_layers(skeleton):
        layer.experts.forward = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)
    ids = torch.zeros(batch_size, context_length, dtype=torch.int64, device="meta")
    try:
        kept = skeleton(input_ids=ids, use_cache=True).past_key_values
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"The cache of {type(model).__name__} cannot be measured without running it ({type(error).__name__}: "
            f"{str(error)[:120]}). Choose `keep` with `plan`."
        ) from error
    found: dict[int, Tensor] = {}
    collect_tensors(kept, found)
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def collect_tensors(value: Any, found: dict[int, Tensor]) -> None:
    """All tensors in a cache, each once, by identity."""
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif isinstance(value, dict):
        for item in value.values():
            collect_tensors(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            collect_tensors(item, found)
    elif type(value).__module__.startswith("transformers") and hasattr(value, "__dict__"):
        collect_tensors(vars(value), found)


def activation_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """An allowance for the activations of one forward over `num_tokens` tokens, in bytes.

    Six hidden states of D numbers a token (residual, norms, attention), and for each of its k experts a copy of its
    input and output and three vectors of the width I, as the grouped implementation holds them; the largest layer
    counts. The logits of one token a row are small beside that.
    """
    config = model.config.get_text_config()
    element = model.dtype.itemsize
    experts = max((x.top_k * (2 * x.hidden_size + 3 * x.intermediate_size) for x in find_layers(model)), default=0)
    return num_tokens * element * (6 * config.hidden_size + experts)
