"""Reports of compressions that never ran, of any size."""

import torch

from hf_mcsmoe.recipe_reading import recipe_from_preset, resolved
from hf_mcsmoe.types import CompressionReport, LayerReport, Trial

HIDDEN, WIDTH, REST_BYTES = 64, 48, 1_000_003
# Text from outside that would be markup if it were not escaped, and names of folders that nobody needs to know.
HOSTILE = "<script>alert('&')</script> \"quoted\" read /home/secret-user/data/x.jsonl"
TRIALS = [
    Trial("m-smoe", {"alignment": None}, kl=0.625, loss_increase=0.5, seconds=8.0),
    Trial("joint-obs", {"refit": "least_squares"}, kl=0.125, loss_increase=0.0625, seconds=12.0, is_chosen=True),
    Trial("x", {}, skipped="it cost $1 and $2"),
]


def synthetic_report(num_layers, num_experts, *, seed=0, narrowed=False, tried=(), **changes):
    """A report of layers that keep about half of their experts, with similarities in which the groups can be seen.

    Expert 1 of every layer was never chosen; the last layer has no held-out error.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, statistics = [], {}
    for number in range(num_layers):
        kept = num_experts // 2 + number % 2
        group = torch.cat([torch.arange(kept), torch.randint(0, kept, (num_experts - kept,), generator=generator)])
        points = torch.randn(kept, 8, generator=generator)[group] + torch.randn(num_experts, 8, generator=generator)
        points = torch.nn.functional.normalize(points.double(), dim=1)
        count = torch.randint(1, 100, (num_experts,), generator=generator)
        count[1] = 0
        layers.append(_layer(number, num_experts, kept, group, count, WIDTH // 2 if narrowed else WIDTH))
        statistics[f"{layers[-1].layer}.selection_count"] = count
        statistics[f"{layers[-1].layer}.similarity"] = (points @ points.T).float()
    layers[-1] = LayerReport(**{**layers[-1].__dict__, "relative_error": None})
    sizes = {}
    for time in ("before", "after"):
        sizes[f"total_parameters_{time}"] = sum(getattr(layer, f"parameters_{time}") for layer in layers) + 500_001
        sizes[f"total_bytes_{time}"] = sum(getattr(layer, f"bytes_{time}") for layer in layers) + REST_BYTES
    values = {
        "recipe": resolved(recipe_from_preset("m-smoe", keep=0.5)),
        "calibration": {"source": HOSTILE, "sha256": "ab" * 32, "tokens": 31_744, "held_out_tokens": 1_024},
        "layers": layers,
        "base_model": "/home/secret-user/models/Tiny-MoE",
        "base_architecture": "Qwen3MoeForCausalLM",
        "seconds": 1_234.5,
        "versions": {"torch": "2.13.0", "hf_mcsmoe": "0.1.0"},
        "warnings": [HOSTILE],
        "tried": list(tried),
        "peak_memory": {"process": 12_345_678, "cuda:0": 7_654_321},
        "statistics": statistics,
        **sizes,
    }
    return CompressionReport(**{**values, **changes})


def _layer(number, num_experts, kept, group, count, width):
    per_expert = 3 * HIDDEN * WIDTH
    return LayerReport(
        layer=f"model.layers.{number}.mlp.experts",
        num_slots=num_experts,
        num_experts_before=num_experts,
        num_experts_after=kept,
        parameters_before=num_experts * per_expert,
        parameters_after=kept * 3 * HIDDEN * width,
        bytes_before=2 * num_experts * per_expert,
        bytes_after=2 * kept * 3 * HIDDEN * width,
        relative_error=0.0123 * (number + 1),
        duplicate_share=0.25,
        unused_experts=1,
        seconds=0.5,
        group_of_expert=group.tolist(),
        dominant_of_group=list(range(kept)),
        usage_frequency=(count / count.sum()).tolist(),
        widths=[width] * kept,
        width_before=WIDTH,
        refit_error_before=0.5 if width < WIDTH else None,
    )
