"""Tokens that ask for far more than others must not be all that a fit sees."""

import dataclasses

import pytest
import torch
from fit_layers import activation, packed_experts, routed, slow_outputs, with_targets_of

from hf_mcsmoe.layer.fit import refit_down
from hf_mcsmoe.observation import sinks
from hf_mcsmoe.observation.beside_experts import BesideExperts
from hf_mcsmoe.observation.sinks import with_bounded_sinks
from hf_mcsmoe.observation.token_batches import RoutedTokens
from hf_mcsmoe.recipe import Recipe

WIDTHS = (4, 0, 3, 5)


def energy_of(tokens):
    return tokens.targets.square().sum(1)


def with_sinks(tokens, sinks_at, factor):
    """A batch some of whose tokens ask for `factor` times as much."""
    targets = tokens.targets.clone()
    targets[sinks_at] *= factor
    return dataclasses.replace(tokens, targets=targets)


def test_ordinary_tokens_come_back_as_they_are():
    batches = [routed(20, 4), routed(7, 4, seed=1)]
    for same in (batches, [], [RoutedTokens(torch.ones(3, 6), torch.ones(3, 4), None)]):
        assert with_bounded_sinks(same) is same
    silent = [dataclasses.replace(batch, targets=torch.zeros_like(batch.targets)) for batch in batches]
    assert with_bounded_sinks(silent) is silent


def test_a_sink_has_a_hundred_times_the_median_energy_and_its_features_shrink_with_it():
    plain = [routed(20, 4), routed(7, 4, seed=1)]
    plain[1].targets[3:] = 0  # tokens that ask for nothing are no measure of what others ask for
    plain[1] = dataclasses.replace(plain[1], dropped_gates=torch.rand(7, 2))
    batches = [plain[0], with_sinks(plain[1], [0], 1000.0)]
    energies = torch.cat([energy_of(batch) for batch in batches])
    most = 100 * energies[energies > 0].median()
    first, second = with_bounded_sinks(batches)
    assert energy_of(second)[0].item() == pytest.approx(most.item(), rel=1e-5)
    scale = second.scale
    assert torch.equal(scale[1:], torch.ones(6)) and scale[0] < 0.1
    for name in ("gates", "targets", "dropped_gates"):
        torch.testing.assert_close(getattr(second, name), getattr(batches[1], name) * scale[:, None])
    assert torch.equal(first.targets, batches[0].targets) and torch.equal(first.gates, batches[0].gates)
    again = [first, second]
    assert with_bounded_sinks(again) is again


def test_what_is_beside_the_experts_counts_less_too():
    beside = BesideExperts(lambda states: states[:, :3].float(), (3, 0), torch.zeros(3, 6))
    tokens = routed(5, 4)
    scaled = dataclasses.replace(tokens, scale=torch.tensor([0.5, 1, 1, 1, 0.1]))
    ((_, plain),), ((_, found),) = beside.features(tokens), beside.features(scaled)
    torch.testing.assert_close(found, plain * scaled.scale[:, None])


def test_a_refit_with_sinks_still_serves_the_other_tokens(monkeypatch):
    experts = packed_experts(widths=WIDTHS)
    noise = torch.randn(experts.down.shape, generator=torch.Generator().manual_seed(5))
    other = dataclasses.replace(experts, down=experts.down + 0.3 * noise)
    ordinary, held_out = (with_targets_of(other, routed(n, 4, seed=n)) for n in (60, 40))
    # What sinks ask for follows another rule, so that one `down` cannot serve both.
    tokens = with_sinks(ordinary, [0, 20], -300.0)
    recipe = Recipe(refit="least_squares", refit_options={"ridges": [1e-3]})
    errors = {}
    for most in (100.0, float("inf")):
        monkeypatch.setattr(sinks, "MOST_ENERGY", most)
        fitted = refit_down(experts, activation, recipe, [tokens], []).experts
        errors[most] = (slow_outputs(fitted, held_out) - held_out.targets).square().sum().item()
    assert errors[100.0] < 0.1 * errors[float("inf")]
