"""Models that have something called experts which cannot be merged, and why."""

from torch import nn


def reason_against(model: nn.Module) -> str | None:
    """Why the experts of a model without a known MoE layer cannot be compressed; None if it has none."""
    for name, module in model.named_modules():
        reason = _product_keys(module) or _chosen_by_dataset(module)
        if reason is not None:
            return f"{name!r} {reason}"
    return None


def _product_keys(module: nn.Module) -> str | None:
    if not hasattr(module, "num_keys") or not isinstance(getattr(module, "up_embed", None), nn.Embedding):
        return None
    return (
        f"retrieves {module.up_embed.num_embeddings} experts of rank 1 by product keys and stores them as rows of "
        "embeddings: an expert has one neuron, and no row of the router is its own"
    )


def _chosen_by_dataset(module: nn.Module) -> str | None:
    if not isinstance(module, nn.ModuleList) or not hasattr(module, "part_features"):
        return None
    return (
        f"has {len(module)} experts that are chosen by the index of a dataset, which the caller passes: there is no "
        "router whose choices could be measured or kept"
    )
