"""Where the shared expert of an MoE layer is, and its last matrix, which a refit may fit with those of the others."""

import dataclasses
from collections import Counter
from collections.abc import Container, Mapping, Sequence

from torch import nn

from ..types import MoeLayer, SharedExpert

# Of the Granite families, whose decoder layers give `post_attention_layernorm(x)` to both and add what they give.
BESIDE_BLOCK, BESIDE_BLOCK_CLASSES = "shared_mlp", "transformers.models.granitemoe"


def find_shared_expert(layer: MoeLayer, modules: Mapping[str, nn.Module]) -> SharedExpert | None:
    """The shared expert beside the routed ones of a layer; None where there is none that a refit can change.

    It is a child of the block with "shared" in its name that ends with a plain linear layer to the hidden size. A
    child with "shared" and "gate" in its name is its gate, if it gives one number. That all this adds up is not
    decided here: names could deceive, so the block is asked, see `observation.shared_features`. A block with a norm
    after the sum (A.X K1) fails that.

    Go without: shared experts that the router weighs (Inkling), that get other tokens than the routed ones do (Ernie
    VL: text and images) or other inputs (the dense parts of Gemma 4 and LongCat, experts in a latent space), ones of
    layers whose routed experts cannot be fitted either (Llama 4), and ones whose last matrix is quantized or has
    adapters.

    Args:
        layer: As described by its family.
        modules: Of the whole model, by path.
    """
    if layer.family.observes_router:
        return None
    named = [(name, child) for name, child in layer.block.named_children() if "shared" in name]
    gates = [child for name, child in named if "gate" in name]
    found = [(f"{layer.block_name}.{name}", child) for name, child in named if "gate" not in name]
    in_block = bool(found)
    if not found:
        parent = layer.block_name.rpartition(".")[0]
        beside = getattr(modules.get(parent), BESIDE_BLOCK, None)
        is_known = type(modules.get(parent)).__module__.startswith(BESIDE_BLOCK_CLASSES)
        found = [(f"{parent}.{BESIDE_BLOCK}", beside)] if is_known and beside is not None else []
    if len(found) != 1 or len(gates) > 1 or not all(is_gate(gate) for gate in gates):
        return None
    name, module = found[0]
    matrices = [child for child in module.modules() if isinstance(child, nn.Linear)]
    if not matrices or type(matrices[-1]) is not nn.Linear or matrices[-1].out_features != layer.hidden_size:
        return None
    return SharedExpert(name, module, matrices[-1], gates[0] if gates else None, in_block)


def is_gate(module: nn.Module) -> bool:
    """Whether a module gives one number for a token."""
    return isinstance(module, nn.Linear) and module.out_features == 1


def without_ties(layers: Sequence[MoeLayer], model: nn.Module, tied: Container[str]) -> list[MoeLayer]:
    """The layers, without the shared experts of `tied` ones and those whose last matrix is used somewhere else too.

    A fit to the tokens of one layer would change the other part of the model as well, or would have to suit the
    tokens of two layers that share their routed experts.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [
        dataclasses.replace(layer, shared=None)
        if layer.shared is not None and (layer.name in tied or uses[id(layer.shared.down.weight)] > 1)
        else layer
        for layer in layers
    ]
