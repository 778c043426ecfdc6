"""Tiny mapped models with experts of each form, and what their experts compute, written from the formula."""

import torch
from tiny_models import tiny_model

from hf_mcsmoe.expert_values import LowRankSparse, PackedExperts, SharedBase, SharedProjection
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling import merged_class
from hf_mcsmoe.modeling.install_forms import (
    install_low_rank_sparse,
    install_ragged,
    install_ranked_low_rank,
    install_shared,
)
from hf_mcsmoe.types import ExpertWeights

FORMED = ("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "switch_transformers")
FORM_NAMES = ("ragged", "low_rank_sparse", "shared_base", "shared_projection", "ranked_low_rank")
IDS = torch.randint(3, 150, (2, 9), generator=torch.Generator().manual_seed(0))
RANK = 8


def logits(model, ids=IDS):
    """Logits of token ids (B, S), for causal and sequence to sequence models."""
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **inputs).logits


def dense_weights(layer, num_experts):
    """The first experts of a layer, in canonical orientation, as views where the family allows."""
    stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
    tensors = layer.family.view(layer, stacked).tensors()
    return ExpertWeights(**{name: tensor[:num_experts] for name, tensor in tensors.items()})


def ragged_part(weights, generator):
    """Some neurons of each expert; none of expert 1, if there are several."""
    packed = PackedExperts.from_dense(weights)
    kept = torch.rand(packed.num_neurons, generator=generator) < 0.6
    if weights.num_experts > 1:
        kept[packed.expert_of_neuron == 1] = False
    return packed.select_neurons(kept.nonzero().flatten())


def split(matrix, rank, kept):
    """The best matrix of a rank, by an SVD, and the rows `kept` (O,) bool of what is left."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    left, right = (left * values)[:, :rank].float(), right[:rank].float()
    rows = kept.nonzero().flatten()
    return LowRankSparse(left, right, rows, (matrix.double() - left.double() @ right.double())[rows].float())


def low_rank_part(weights, generator, rank=RANK):
    """Factors of each matrix with another number of rows for each expert; none of `down` in expert 0."""
    factors = {}
    for name in ("gate", "up", "down"):
        matrices = getattr(weights, name)
        if matrices is None:
            continue
        factors[name] = []
        for expert, matrix in enumerate(matrices):
            share = 0 if (name, expert) == ("down", 0) else 0.1 + 0.1 * expert
            factors[name].append(split(matrix, rank, torch.rand(len(matrix), generator=generator) < share))
    return factors


def shared_base_part(weights, generator, rank=RANK):
    """The mean of all experts as a base, and factors with rows of what each one differs by."""
    bases = {name: t.float().mean(0) for name, t in weights.tensors().items() if not name.endswith("_bias")}
    differences = {name: getattr(weights, name).float() - base for name, base in bases.items()}
    return SharedBase(bases, low_rank_part(ExpertWeights(**differences), generator, rank), biases(weights))


def shared_projection_part(weights, generator, rank=RANK):
    """Random projections, and each matrix in their numbers by least squares."""
    hidden = weights.up.shape[2]
    inward, outward = (torch.randn(rank, hidden, generator=generator) * hidden**-0.5 for _ in range(2))
    latent = {
        name: getattr(weights, name).float() @ inward.pinverse()
        for name in ("gate", "up")
        if name in weights.tensors()
    }
    latent["down"] = outward.T.pinverse() @ weights.down.float()
    return SharedProjection(inward, outward.T.contiguous(), latent, biases(weights))


def ranked_part(weights):
    """Factors of each matrix, of rank 3 in the first expert and one more in each next one."""
    matrices = {name: t for name, t in weights.tensors().items() if not name.endswith("_bias")}
    none = {name: torch.zeros(t.shape[1], dtype=torch.bool) for name, t in matrices.items()}
    return {name: [split(m, 3 + e, none[name]) for e, m in enumerate(t)] for name, t in matrices.items()}


def biases(weights):
    """The biases of each matrix, where there are any."""
    return {name.removesuffix("_bias"): t for name, t in weights.tensors().items() if name.endswith("_bias")}


def layout_entry(layer, num_experts, has_dropped=True, collapse_duplicates=False):
    """What a layer's entry says before a form adds its keys."""
    return {
        "num_experts": num_experts,
        "num_slots": layer.num_slots,
        "has_dropped": has_dropped,
        "collapse_duplicates": collapse_duplicates,
    }


def change_layer(layer, form, num_experts, generator, source=None, **options):
    """Give a layer experts of a form, slot 2 dropped; returns its entry in the layout.

    `source` is the layer whose weights they are made from, another one where those of `layer` are offloaded.
    """
    weights = dense_weights(source or layer, num_experts)
    slot_map = torch.arange(layer.num_slots) % num_experts
    slot_map[2] = -1
    entry = layout_entry(layer, num_experts, **options)
    if form == "ragged":
        install_ragged(layer, ragged_part(weights, generator), slot_map, entry)
    elif form == "shared_base":
        install_shared(layer, shared_base_part(weights, generator), slot_map, entry)
    elif form == "ranked_low_rank":
        install_ranked_low_rank(layer, ranked_part(weights), biases(weights), slot_map, entry)
    elif form == "shared_projection":
        install_shared(layer, shared_projection_part(weights, generator), slot_map, entry)
    else:
        install_low_rank_sparse(layer, low_rank_part(weights, generator), biases(weights), slot_map, entry)
    return entry


def adopt(model, layers):
    """Make a model with changed layers what `compress_moe` returns."""
    model.config.merged_sparse_moe = {
        "recipe": {},
        "base_architecture": type(model).__name__,
        "layers": layers,
        "provenance": {},
        "format_version": 1,
    }
    model.__class__ = merged_class(type(model))
    return model


def formed_model(family, form, num_experts=5, dtype=torch.float32, **options):
    """A tiny mapped model whose MoE layers all have experts of a form."""
    model = tiny_model(family).to(dtype)
    generator = torch.Generator().manual_seed(1)
    layers = {x.name: change_layer(x, form, num_experts, generator, **options) for x in find_layers(model)}
    return adopt(model, layers)


def act(family, up, gate):
    """The activations of the families in `FORMED`, from their papers."""
    if family == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    if family == "nemotron_h":
        return up.clamp(min=0) ** 2
    if family == "switch_transformers":
        return up.clamp(min=0)
    return gate * torch.sigmoid(gate) * up


def slow_output(family, weights, slot_map, hidden, slots, gates):
    """Sum over a token's slots of weight times expert output, token by token, slot by slot. (T, D)."""
    rows = []
    for token in range(len(hidden)):
        total = torch.zeros_like(hidden[token])
        for slot, gate_weight in zip(slots[token].tolist(), gates[token], strict=True):
            e = slot_map[slot].item()
            if e < 0:
                continue
            bias = {name: getattr(weights, f"{name}_bias") for name in ("gate", "up", "down")}
            bias = {name: 0 if b is None else b[e] for name, b in bias.items()}
            gate = None if weights.gate is None else weights.gate[e] @ hidden[token] + bias["gate"]
            inner = act(family, weights.up[e] @ hidden[token] + bias["up"], gate)
            total = total + gate_weight * (weights.down[e] @ inner + bias["down"])
        rows.append(total)
    return torch.stack(rows)
