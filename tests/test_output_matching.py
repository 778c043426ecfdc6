"""Training one layer on its own tokens: how far its steps go, and that held-out tokens decide what is kept."""

import dataclasses

import pytest
import torch
from fit_layers import activation, packed_experts, routed, slow_features, with_targets_of
from torch.testing import assert_close

from hf_mcsmoe.matching.adam import draw, match_by_adam
from hf_mcsmoe.matching.tokens import MatchingTokens, held_out_error

WIDTHS = (4, 3, 5)
EXPERTS = packed_experts(widths=WIDTHS)


def tokens(noise=0.5, scale=1.0):
    """Targets that the experts give, with noise."""
    batch = with_targets_of(EXPERTS, routed(60, len(WIDTHS)), noise=noise)
    return dataclasses.replace(batch, targets=scale * batch.targets)


def match(seen, held_out=None, experts=EXPERTS, **options):
    how = {"seed": 0, "steps": 1, "tokens_per_step": 60, "learning_rate": 0.1, **options}
    return match_by_adam(experts, activation, MatchingTokens([seen]), MatchingTokens([held_out or seen]), **how)


def relative_error(batch, experts=EXPERTS):
    output = slow_features(experts, batch) @ experts.down.double()
    if experts.down_bias is not None:
        output = output + batch.gates.double() @ experts.down_bias.double()
    return ((output - batch.targets.double()).square().sum() / batch.targets.double().square().sum()).item()


@pytest.mark.parametrize(("noise", "scale"), [(0.5, 1.0), (0.05, 1.0), (0.5, 1e-3)])
def test_a_first_step_is_as_long_as_the_error_at_most_as_the_learning_rate(noise, scale):
    """Adam moves every entry that has a gradient by the learning rate of its matrix."""
    seen = tokens(noise, scale)
    error = relative_error(seen)
    assert (error > 1) == (scale == 1e-3)
    matched = match(seen)
    for name in ("gate", "up", "down"):
        before, after = getattr(EXPERTS, name), getattr(matched, name)
        expected = 0.1 * min(1.0, error) ** 0.5 * before.square().mean().sqrt()
        assert_close((after - before).abs().max(), expected, rtol=1e-3, atol=0)


def test_held_out_tokens_decide_which_state_is_kept():
    seen, almost_exact = tokens(), tokens(noise=0.01)
    kept = match(seen, almost_exact, steps=20, learning_rate=10.0).tensors()
    assert all(torch.equal(t, EXPERTS.tensors()[name]) for name, t in kept.items())
    matched = match(seen, steps=20)
    assert held_out_error(matched, activation, MatchingTokens([seen])) == pytest.approx(
        relative_error(seen, matched) * seen.targets.double().square().sum().item(), rel=1e-5
    )
    assert relative_error(seen, matched) < relative_error(seen)
    assert relative_error(seen, match(seen, steps=80)) < relative_error(seen, matched)


def test_experts_that_give_their_targets_are_left_alone():
    seen = with_targets_of(EXPERTS, routed(60, len(WIDTHS)))
    own = MatchingTokens([seen])
    exact = dataclasses.replace(seen, targets=seen.targets - seen.targets)
    silent = dataclasses.replace(EXPERTS, down=torch.zeros_like(EXPERTS.down), down_bias=None)
    assert held_out_error(silent, activation, MatchingTokens([exact])) == 0
    assert match(exact, experts=silent) is silent
    assert held_out_error(EXPERTS, activation, own) < 1e-9 * seen.targets.square().sum()


def test_all_tokens_are_seen_before_one_is_seen_again():
    parts = list(draw(10, 4, 5, seed=3))
    assert [len(part) for part in parts] == [4] * 5
    assert len(set(torch.cat(parts[:2]).tolist())) == 8
    assert all(torch.equal(a, b) for a, b in zip(parts, draw(10, 4, 5, seed=3), strict=True))
    assert [len(part) for part in draw(3, 4, 2, seed=0)] == [3, 3]
