"""Conjugate gradients over the tokens against the solution with the joint Gram matrix."""

import dataclasses

import pytest
import torch
from torch.nn.functional import silu

from hf_mcsmoe.expert_values import PackedExperts
from hf_mcsmoe.layer import fit, refit_by_passes
from hf_mcsmoe.observation.gated_features import apply_down, sum_features
from hf_mcsmoe.observation.token_batches import RoutedTokens
from hf_mcsmoe.recipe import Recipe
from hf_mcsmoe.refit.least_squares import refit_by_least_squares

NUM_EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 5, 12, 20, 900, 2


def activation(up, gate):
    return silu(gate) * up


def layer(seed=0, has_bias=False, never_used=()):
    """(experts of different widths, tokens whose targets are what wider experts gave)."""
    generator = torch.Generator().manual_seed(seed)
    size = NUM_EXPERTS * WIDTH
    gate, up, down = (torch.randn(size, HIDDEN, generator=generator) / 3 for _ in range(3))
    down_bias = torch.randn(NUM_EXPERTS, HIDDEN, generator=generator) if has_bias else None
    experts = PackedExperts(torch.arange(NUM_EXPERTS + 1) * WIDTH, up, down, gate, down_bias=down_bias)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    hidden_states = torch.randn(TOKENS, HIDDEN, generator=generator) @ mixing
    scores = torch.rand(TOKENS, NUM_EXPERTS, generator=generator)
    scores[:, list(never_used)] = -1
    chosen = scores.topk(TOP_K)
    gates = torch.zeros(TOKENS, NUM_EXPERTS).scatter(1, chosen.indices, chosen.values)
    tokens = RoutedTokens(hidden_states, gates, torch.zeros(TOKENS, HIDDEN))
    tokens = dataclasses.replace(tokens, targets=apply_down(experts, activation, tokens))
    kept = torch.arange(size)[torch.rand(size, generator=generator) < 0.5]
    parts = [slice(0, 400), slice(400, TOKENS)]
    batches = [RoutedTokens(tokens.hidden_states[p], tokens.gates[p], tokens.targets[p]) for p in parts]
    return experts.select_neurons(kept), batches


@pytest.mark.parametrize("has_bias", [False, True])
def test_passes_find_the_ridge_solution_of_the_joint_gram(has_bias, monkeypatch):
    monkeypatch.setattr(refit_by_passes, "TOLERANCE", 1e-6)
    experts, batches = layer(has_bias=has_bias)
    sums, old = sum_features(experts, activation, batches), experts.down.double()
    exact = refit_by_least_squares(sums, None, experts.offsets.tolist(), old, ridges=(1e-2,))
    found = refit_by_passes.refit_by_passes(experts, activation, batches, ridge=1e-2)
    assert (exact - old).norm() > 0.1 * old.norm()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


def test_an_expert_without_tokens_keeps_its_weights():
    experts, batches = layer(never_used=(3,))
    found = refit_by_passes.refit_by_passes(experts, activation, batches)
    neurons = slice(*experts.offsets[3:5].tolist())
    assert torch.equal(found[neurons], experts.down[neurons].double())
    assert not torch.equal(found[: neurons.start], experts.down[: neurons.start].double())
    assert found.isfinite().all()


def test_large_layers_are_refitted_by_passes_and_guarded(monkeypatch):
    experts, batches = layer()
    recipe = Recipe(refit="least_squares", refit_options={"ridges": (1e-2,)})
    small = fit.refit_down(experts, activation, recipe, batches[:1], batches[1:])
    monkeypatch.setattr(fit, "MOST_JOINT_NEURONS", experts.num_neurons - 1)
    monkeypatch.setattr(fit, "sum_features", None)  # the joint Gram matrix must not be built
    large = fit.refit_down(experts, activation, recipe, batches[:1], batches[1:])
    assert large.is_refitted and large.error_before_refit == pytest.approx(small.error_before_refit, rel=1e-4)
    assert large.error_after_refit == pytest.approx(small.error_after_refit, rel=1e-2)
    monkeypatch.setattr(fit, "refit_by_passes", lambda experts, *_: 3 * experts.down.double())
    worse = fit.refit_down(experts, activation, recipe, batches[:1], batches[1:])
    assert not worse.is_refitted and torch.equal(worse.experts.down, experts.down)
