"""The error of down projections on held-out tokens, against the residual of the stacked features."""

import pytest
import torch
from fit_layers import FORMATS, activation, packed_experts, routed, slow_constants, slow_features

from hf_mcsmoe.observation import token_batches
from hf_mcsmoe.observation.held_out_error import HeldOutError
from hf_mcsmoe.observation.token_batches import RoutedTokens

WIDTHS = (4, 0, 3, 5)


@pytest.mark.parametrize("names", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("columns", [slice(None), slice(None, None, 4)], ids=["all", "some"])
def test_it_is_the_squared_residual_in_the_columns(names, columns, monkeypatch):
    monkeypatch.setattr(token_batches, "CHUNK_TOKENS", 7)
    experts = packed_experts(names, WIDTHS, hidden=10)
    batches = [routed(n, 4, hidden=10, seed=n) for n in (9, 4, 11)]
    down = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    judge = HeldOutError(experts, activation, batches)
    targets = [batch.targets.double() - slow_constants(experts, batch) for batch in batches]
    residuals = [y - slow_features(experts, b) @ down for y, b in zip(targets, batches, strict=True)]
    expected = sum(residual[:, columns].square().sum().item() for residual in residuals)
    assert judge(down[:, columns], columns) == pytest.approx(expected, rel=1e-5)
    energy = sum(y.square().sum().item() for y in targets)
    assert judge.energy == pytest.approx(energy, rel=1e-5)
    if columns == slice(None):
        assert judge.relative(down) == pytest.approx(expected / energy, rel=1e-5)


def test_without_anything_to_give_no_error_is_relative():
    experts, tokens = packed_experts(widths=WIDTHS), routed(5, 4)
    silent = RoutedTokens(tokens.hidden_states, tokens.gates, torch.zeros_like(tokens.targets))
    for batches in ([], [silent]):
        assert HeldOutError(experts, activation, batches).relative(experts.down) is None
