"""How large a model and its MoE layers are: parameters, bytes and FLOPs, from shapes and dtypes alone."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from .decomposition import DECOMPOSITION
from .modeling.constant_outputs import ConstantOutputs
from .modeling.experts import slot_axis
from .modeling.forms import ExpertForm, form_layers
from .modeling.forms.low_rank_sparse import matrix_sizes
from .recipe import Recipe
from .shared_base import SHARED_BASE
from .shared_budget import base_budget, latent_size
from .solvers.low_rank import num_kept_rows, resolve_rank
from .types import MoeLayer

INDEX_BYTES = 8  # of an int64: a slot of the expert map, or the index of a row that a sparse part keeps


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, or of a part of it. Differences and sums of sizes are sizes."""

    total_parameters: int  # tied ones once
    active_parameters: int  # what one token uses, see `measure`
    expert_parameters: int  # of the routed experts
    total_bytes: int  # of all tensors that a checkpoint stores, file headers left out
    expert_bytes: int
    flops_per_token: int  # 2 for each active matrix entry; the scores of attention are left out

    def __add__(self, other: "Sizes") -> "Sizes":
        return Sizes(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __sub__(self, other: "Sizes") -> "Sizes":
        return Sizes(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass(frozen=True)
class ExpertSize:
    """Size of one expert."""

    parameters: int
    bytes: int
    matrix_entries: int  # multiplications that a token costs


def measure(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> Sizes:
    """Sizes of a model on any device, meta included.

    Active are all parameters outside of the routed experts, plus `min(k, M)` experts of every MoE layer. Embedding
    tables are looked up, not multiplied: they do not count, unless tied to the output layer, where they count once.
    In an encoder-decoder these are the parameters that one source and one target token use together.

    Args:
        model: The model; its experts that are not dense are found here.
        layers: Its MoE layers with dense experts, from `find_layers`.
    """
    formed = form_layers(model).values()
    experts = {id(tensor) for layer in layers for tensor in layer.expert_parameters.values()}
    experts |= {id(tensor) for form in formed for tensor in expert_tensors(form)}
    constants = {id(m.vectors) for m in model.modules() if isinstance(m, ConstantOutputs)}
    lookups = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    rest = Sizes(0, 0, 0, 0, 0, 0)
    for names, tensor in stored_tensors(model):
        if id(tensor) in experts:
            continue
        numel = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        active = 0 if lookups.issuperset(names) else numel
        flops = 2 * active if tensor.dim() >= 2 else 0
        size = tensor.numel() * tensor.element_size()
        of_experts = (numel, size) if id(tensor) in constants else (0, 0)
        rest += Sizes(numel, active, of_experts[0], size, of_experts[1], flops)
    for layer in layers:
        sizes = expert_sizes(layer, layer.num_experts, expert_size(layer))
        # Tied experts of two layers are stored once but used twice.
        is_new = experts.intersection(map(id, layer.expert_parameters.values()))
        experts -= is_new
        rest += sizes if is_new else Sizes(0, sizes.active_parameters, 0, 0, 0, sizes.flops_per_token)
        for rows in layer.passive_expert_rows.values() if is_new else ():
            rest += Sizes(rows.numel(), 0, 0, rows.numel() * rows.element_size(), 0, 0)
    return sum((form_sizes(form) for form in formed), rest)


def expert_tensors(form: ExpertForm) -> list[Tensor]:
    """What experts that are not dense are stored in: parameters and the indices of kept rows."""
    indices = [buffer for name, buffer in form.named_buffers(recurse=False) if name.endswith("_rows")]
    return [*form.parameters(recurse=False), *indices]


def form_sizes(form: ExpertForm) -> Sizes:
    """What experts that are not dense add to the sizes of the model; an average one stands for those of a token."""
    tensors, used = expert_tensors(form), min(form.dense_layer.top_k, form.num_stored)
    total = sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))
    entries = sum(p.numel() for name, p in form.named_parameters(recurse=False) if not name.endswith("_bias"))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    shared = sum(form.get_parameter(name).numel() for name in form.shared_names)
    flops = 2 * (shared + used * (entries - shared) // form.num_stored)
    return Sizes(total, shared + used * (total - shared) // form.num_stored, total, size, size, flops)


def stored_tensors(model: PreTrainedModel) -> list[tuple[set[str], Tensor]]:
    """The tensors that a checkpoint of `model` holds, each with all the names that it has in the model."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = set(model._keys_to_ignore_on_save or ())
    named = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    found: dict[int, tuple[set[str], Tensor]] = {}
    for name, tensor in named.items():
        # Weights that Accelerate keeps elsewhere are different objects although they are tied.
        tensor = named.get(tied.get(name, name), tensor)
        if name not in ignored:
            found.setdefault(id(tensor), (set(), tensor))[0].add(name)
    return list(found.values())


def expert_size(layer: MoeLayer, decomposed_by: Recipe | None = None) -> ExpertSize:
    """Size of one expert of a layer, as it is or decomposed.

    `W (O, I) ~ left (O, r) right (r, I) + sparse`, where `sparse` keeps `floor(keep_rows * O + 1/2)`
    rows of I numbers: the sizes of Li et al., 2024 (https://arxiv.org/abs/2310.01334). Like there, the indices of
    the kept rows are no parameters; they are in the bytes, 8 for each row. Biases stay as they are.

    Args:
        layer: The layer.
        decomposed_by: A recipe with a decomposition; None for the expert as it is. With a ranked one it is the size
            of an average expert, and M of them have exactly M times that.
    """
    width, hidden = layer.intermediate_size, layer.hidden_size
    shapes = [(width, hidden)] * (2 if layer.format.has_gate else 1) + [(hidden, width)]
    entries = sum(rows * columns for rows, columns in shapes)
    if decomposed_by is None:
        return ExpertSize(layer.parameters_per_expert, layer.bytes_per_expert, entries)
    if decomposed_by.is_ranked:
        kept_rows = [0] * len(shapes)
        ranks = [decomposed_by.mean_rank(layer.num_slots, shape) for shape in shapes]
    else:
        budget = DECOMPOSITION.options(decomposed_by.decomposition) | decomposed_by.decomposition_options
        kept_rows = [num_kept_rows(budget["keep_rows"], rows) for rows, _ in shapes]
        ranks = [resolve_rank(shape, budget["rank"], budget["parameter_ratio"]) for shape in shapes]
    factors = sum(
        rank * (rows + columns) + kept * columns
        for (rows, columns), rank, kept in zip(shapes, ranks, kept_rows, strict=True)
    )
    element_size = max(layer.expert_parameters.values(), key=Tensor.numel).element_size()
    return ExpertSize(
        parameters=layer.parameters_per_expert - entries + factors,
        bytes=layer.bytes_per_expert + (factors - entries) * element_size + sum(kept_rows) * INDEX_BYTES,
        matrix_entries=factors,
    )


def shared_sizes(layer: MoeLayer, recipe: Recipe) -> Sizes:
    """What the N experts of a layer add to the sizes of the model when they share a part, as `shared_base` says.

    Like those of `expert_size`, indices of kept rows are in the bytes only, 8 for each.

    Raises:
        ValueError: `keep` is too small.
    """
    sizes, count, used = matrix_sizes(layer), layer.num_slots, min(layer.top_k, layer.num_slots)
    if SHARED_BASE.trait(recipe.shared_base, "shares") == "base":
        options = SHARED_BASE.options(recipe.shared_base) | recipe.shared_base_options
        budget = base_budget(sizes, count, recipe.keep, options["rows"])
        shared = sum(outputs * inputs for outputs, inputs in sizes.values())
        own = sum(budget.rank * (o + i) + budget.num_rows[matrix] * i for matrix, (o, i) in sizes.items())
        indices = INDEX_BYTES * count * sum(budget.num_rows.values())
    else:
        latent = latent_size(sizes, count, recipe.keep)
        shared, own, indices = 2 * latent * layer.hidden_size, len(sizes) * latent * layer.intermediate_size, 0
    biases = layer.parameters_per_expert - sum(outputs * inputs for outputs, inputs in sizes.values())
    element_size = max(layer.expert_parameters.values(), key=Tensor.numel).element_size()
    parameters = shared + count * (own + biases)
    size = parameters * element_size + indices
    active = shared + used * (own + biases)
    return Sizes(parameters, active, parameters, size, size, 2 * (shared + used * own))


def neuron_size(layer: MoeLayer) -> ExpertSize:
    """Size of one neuron of an expert: its row of each matrix and its entries of the biases before the activation."""
    rows = 2 if layer.format.has_gate else 1
    entries = (rows + 1) * layer.hidden_size
    numbers = entries + (rows if layer.format.has_bias else 0)
    return ExpertSize(numbers, numbers * layer.bytes_per_expert // layer.parameters_per_expert, entries)


def neuron_sizes(layer: MoeLayer, num_experts: int, num_neurons: int) -> Sizes:
    """What `num_neurons`, spread evenly over M experts, add to the sizes of the model."""
    one = neuron_size(layer)
    used = min(layer.top_k, num_experts) * num_neurons
    active, entries = used * one.parameters // num_experts, used * one.matrix_entries // num_experts
    parameters, size = num_neurons * one.parameters, num_neurons * one.bytes
    return Sizes(parameters, active, parameters, size, size, 2 * entries)


def expert_sizes(layer: MoeLayer, num_experts: int, expert: ExpertSize) -> Sizes:
    """What `num_experts` experts of a layer add to the sizes of the model."""
    # Several of a token's k slots may hold one expert, so k is what is used at most.
    used = min(layer.top_k, num_experts)
    parameters, size = num_experts * expert.parameters, num_experts * expert.bytes
    return Sizes(parameters, used * expert.parameters, parameters, size, size, 2 * used * expert.matrix_entries)


def constant_sizes(layer: MoeLayer, num_constants: int) -> Sizes:
    """What the constants of dropped slots add to the sizes of the model: D numbers each, all of them active."""
    numbers = num_constants * layer.hidden_size
    size = numbers * next(iter(layer.expert_parameters.values())).element_size() if numbers else 0
    return Sizes(numbers, numbers, numbers, size, size, 2 * numbers)


def router_sizes(layer: MoeLayer, num_slots: int) -> Sizes:
    """What the entries of `num_slots` slots add to the sizes of the model: router rows, biases, scales.

    Rows of the router that belong to no routed expert are left out: they stay whatever becomes of the others.
    """
    block = {name: tensor for name, tensor in layer.block.state_dict(keep_vars=True).items() if "." not in name}
    total = Sizes(0, 0, 0, 0, 0, 0)
    for tensor in [*layer.router.state_dict(keep_vars=True).values(), *block.values()]:
        sizes = (layer.num_slots, layer.num_slots + layer.num_passive_rows)
        rows = next((rows for rows in sizes if slot_axis(tensor, rows) is not None), None)
        if rows is None:
            continue
        entries = tensor.numel() // rows * num_slots
        parameters = entries if isinstance(tensor, nn.Parameter) else 0
        flops = 2 * parameters if tensor.dim() >= 2 else 0
        total += Sizes(parameters, parameters, 0, entries * tensor.element_size(), 0, flops)
    return total
