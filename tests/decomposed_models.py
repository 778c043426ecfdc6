"""Tiny models whose experts are decomposed, without merging any."""

import torch
from transformers import PreTrainedModel

from hf_mcsmoe import Recipe
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layer.expert_decomposition import decompose_experts
from hf_mcsmoe.modeling.install_forms import install_low_rank_sparse
from hf_mcsmoe.outcome import adopt_mapped


def decompose_model(model: PreTrainedModel, rule: str = "low_rank_sparse", **options) -> PreTrainedModel:
    """`model` with every expert decomposed, in place: as `compress_moe` leaves a mapped model."""
    layouts = {}
    for layer in find_layers(model):
        num_experts = layer.num_experts
        layout = {"num_slots": layer.num_slots, "num_experts": num_experts}
        layout |= {"has_dropped": False, "collapse_duplicates": False}
        weights = layer.family.view(layer, layer.family.stack(layer, layer.expert_parameters))
        factors, biases = decompose_experts(weights, rule, options)
        install_low_rank_sparse(layer, factors, biases, torch.arange(num_experts), layout)
        layouts[layer.name] = layout
    adopt_mapped(model, Recipe(keep=1.0), layouts, type(model).__name__, {})
    return model
