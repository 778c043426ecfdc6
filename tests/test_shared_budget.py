"""Experts that share something: their budgets, what a token costs, and what is refused."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layouts import check_layout
from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.outcome import count
from hf_mcsmoe.planning import plan
from hf_mcsmoe.shared_base import SHARED_BASE
from hf_mcsmoe.shared_budget import base_budget, latent_size
from hf_mcsmoe.sizes import measure, shared_sizes

RULES = {name: SHARED_BASE.trait(name, "shares") for name in SHARED_BASE}


@pytest.mark.parametrize("rows", [0.0, 0.4])
def test_the_base_budget_is_the_largest_that_fits(rows):
    sizes = {"gate": (24, 32), "up": (24, 32), "down": (32, 24)}
    for keep in (0.3, 0.5, 0.75, 0.99):
        budget = base_budget(sizes, 16, keep, rows)

        def numbers(rank, budget=budget):
            own = sum(rank * (o + i) + budget.num_rows[m] * i for m, (o, i) in sizes.items())
            return sum(o * i for o, i in sizes.values()) + 16 * own

        allowed = keep * 16 * 3 * 24 * 32
        assert numbers(budget.rank) <= allowed < numbers(budget.rank + 2)
        assert bool(budget.num_rows["up"]) == (rows > 0)
    # methods of section E.2 by hand: Qwen3-30B at one half, r = (N/2 - 1)/N * 768 * 2048 / 2816 = 274.9
    qwen = {"up": (768, 2048), "down": (2048, 768)}
    assert base_budget(qwen, 128, 0.5, 0.0).rank == 272  # of 274, a multiple of 8
    with pytest.raises(ValueError, match=r"keep is 0.1, but a base takes 0.125 of 8 experts.*at least about 0.198"):
        base_budget(sizes, 8, 0.1, 0.0)
    assert base_budget(sizes, 8, 0.199, 0.0).rank == 1


def test_the_latent_size_is_the_largest_that_fits():
    sizes = {"gate": (24, 32), "up": (24, 32), "down": (32, 24)}
    for keep in (0.1, 0.5, 0.9):
        size = latent_size(sizes, 8, keep)
        numbers = [8 * 3 * 24 * m + 2 * 32 * m for m in (size, size + 1)]
        assert numbers[0] <= keep * 8 * 3 * 24 * 32 < numbers[1]
    with pytest.raises(ValueError, match=r"keep is 0.01, which leaves no latent number"):
        latent_size(sizes, 8, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "switch_transformers"])
@pytest.mark.parametrize("rule", RULES)
def test_plan_report_model_and_checkpoint_agree(rule, family, original, tokens, tmp_path):
    if "fisher" in SHARED_BASE.needs(rule) and family == "switch_transformers":
        pytest.skip("an encoder-decoder has no gradients of a loss of its own")
    options = {"rows": 0.3} if RULES[rule] == "base" and family == "qwen3_moe" else {}
    recipe = Recipe(keep=0.6, shared_base=rule, shared_base_options=options, similarity=None, grouping="drop")
    model, result = original(family), compress_moe(original(family), recipe, calibration=tokens, progress=False)
    planned, report = plan(model, recipe), result.compression_report
    assert count(result) == (report.total_parameters_after, report.total_bytes_after)
    assert report.total_parameters_after == planned.total_parameters_after
    assert sum(r.parameters_after for r in report.layers) == planned.expert_parameters_after
    assert sum(r.bytes_after for r in report.layers) == planned.expert_bytes_after
    assert planned.expert_parameters_after <= 0.6 * planned.expert_parameters_before + 8 * 3 * 200  # biases stay
    sizes = measure(result, [])
    assert sizes.total_bytes == planned.total_bytes_after
    assert (sizes.flops_per_token, sizes.active_parameters) == (
        planned.flops_per_token_after,
        planned.active_parameters_after,
    )
    assert all(r.group_of_expert == list(range(8)) for r in report.layers)
    result.save_pretrained(tmp_path)
    if family != "switch_transformers":
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(again(tokens[:2]).logits, result(tokens[:2]).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("rule", RULES)
def test_a_token_costs_what_the_plan_says(rule, implementation, original, tokens):
    recipe = Recipe(keep=0.5, shared_base=rule, similarity=None, grouping="drop")
    result = compress_moe(original("qwen3_moe"), recipe, calibration=tokens, progress=False)
    result.set_experts_implementation(implementation)
    layer = find_layers(original("qwen3_moe"))[0]
    planned = shared_sizes(layer, recipe)
    experts = form_layers(result)[layer.name]
    gates, slots = torch.rand(13, 8).topk(2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        experts(torch.randn(13, layer.hidden_size), slots, gates)
    assert counter.get_total_flops() == 13 * planned.flops_per_token


# --- what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layout": "native"}, r"shared_base needs layout 'mapped', got 'native'"),
        ({"num_experts": 4}, r"num_experts is 4, but with shared_base 'aligned_residuals' all experts stay"),
        ({"refit": "least_squares"}, r"shared_base is 'aligned_residuals' and refit is 'least_squares'"),
        ({"decomposition": "low_rank_sparse"}, r"and decomposition is 'low_rank_sparse', which is for experts of"),
        ({"shared_base_options": {"rows": 1}}, r"rows is 1, it must be in \[0, 1\)"),
        ({"shared_base_options": {"iterations": -1}}, r"iterations is -1, it must be a whole number >= 0"),
        ({"shared_base": "whitened_deltas", "shared_base_options": {"ridge": -1}}, r"ridge is -1, it must be"),
    ],
)
def test_what_cannot_be_done_is_refused_when_the_recipe_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"shared_base": "aligned_residuals", **fields})


def test_too_small_a_share_is_refused_before_anything_runs(original):
    model = original("mixtral")
    with pytest.raises(ValueError, match=r"'aligned_residuals' does not fit.*keep is 0.1.*at least about"):
        check_layout(find_layers(model), Recipe(keep=0.1, shared_base="aligned_residuals"), model=model)
    model = original("gemma4_text")
    layers = find_layers(model)
    layers[0].experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match="cannot share a part: their outputs are normalised one by one"):
        check_layout(layers, Recipe(shared_base="latent_projection"), model=model)
