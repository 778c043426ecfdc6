"""The refit of experts together with a shared expert and constants of dropped slots, against numpy on all features."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from fit_layers import FORMATS, HIDDEN, activation, packed_experts, routed, slow_constants, slow_features

from hf_mcsmoe.layer import fit
from hf_mcsmoe.layer.fit import fit_experts, refit_down
from hf_mcsmoe.layer.refit_by_passes import refit_by_passes
from hf_mcsmoe.matching.tokens import MatchingTokens
from hf_mcsmoe.observation import sinks, token_batches
from hf_mcsmoe.observation.beside_experts import BesideExperts, joint_offsets
from hf_mcsmoe.observation.gated_features import sum_features
from hf_mcsmoe.observation.token_batches import in_chunks
from hf_mcsmoe.recipe import Recipe

WIDTHS, SHARED, DROPPED = (4, 0, 3, 5), 7, 3
NEURONS = sum(WIDTHS)
KINDS = {"both": (SHARED, DROPPED), "shared": (SHARED, 0), "constants": (0, DROPPED)}
INNER = torch.randn(SHARED, HIDDEN, generator=torch.Generator().manual_seed(77))


def shared(hidden_states):
    """The features of a shared expert with a gate: (t, D) -> (t, SHARED)."""
    states = hidden_states.float()
    return (states @ INNER.T).relu() * states.sum(1, keepdim=True).sigmoid()


def beside_of(kind="both", change=0.0):
    """Blocks beside the experts, with a random change of some size."""
    widths = KINDS[kind]
    noise = torch.randn(sum(widths), HIDDEN, generator=torch.Generator().manual_seed(5))
    return BesideExperts(shared if widths[0] else None, widths, change * noise)


def with_dropped(batch, seed=0):
    """The batch with gates of dropped slots: few tokens have one, and the last slot is never chosen."""
    gates = torch.rand(len(batch.gates), DROPPED, generator=torch.Generator().manual_seed(seed + 40))
    gates = gates * (gates > 0.7)
    gates[:, -1] = 0
    return dataclasses.replace(batch, dropped_gates=gates)


def tokens_of(num_tokens, seed=0):
    return with_dropped(routed(num_tokens, len(WIDTHS), seed=seed), seed)


def slow_joint_features(experts, beside, batch):
    """(T, P + P') float64, column by column."""
    columns = [slow_features(experts, batch)]
    if beside.widths[0]:
        of_shared = torch.zeros(len(batch.gates), SHARED, dtype=torch.float64)
        for token, x in enumerate(batch.hidden_states.double()):
            for neuron, row in enumerate(INNER.double()):
                of_shared[token, neuron] = max(0.0, (row @ x).item()) / (1 + math.exp(-x.sum().item()))
        columns.append(of_shared)
    if beside.widths[1]:
        columns.append(batch.dropped_gates.double())
    return torch.cat(columns, dim=1)


def slow_target(experts, batch):
    return batch.targets.double() - slow_constants(experts, batch)


def joint_down(experts, beside):
    return torch.cat([experts.down, beside.change]).double()


def blocks_of(beside):
    widths = [*WIDTHS, *(width for width in beside.widths if width)]
    return list(itertools.pairwise(np.cumsum([0, *widths])))


def slow_fit(experts, beside, batch, ridge):
    """numpy's least squares with one ridge a block, relative to the mean energy of its features."""
    phi, target = slow_joint_features(experts, beside, batch).numpy(), slow_target(experts, batch).numpy()
    squares, roots = (phi**2).sum(0), np.zeros(phi.shape[1])
    for start, end in blocks_of(beside):
        if end > start:
            own = squares[start:end].mean()
            roots[start:end] = (ridge * (own if own > 0 else squares.mean())) ** 0.5
    rows = np.concatenate([phi, np.diag(roots)])
    wanted = np.concatenate([target, roots[:, None] * joint_down(experts, beside).numpy()])
    return torch.from_numpy(np.linalg.lstsq(rows, wanted, rcond=None)[0])


def error(experts, beside, batch):
    output = slow_joint_features(experts, beside, batch) @ joint_down(experts, beside)
    return (slow_target(experts, batch) - output).square().sum().item()


def refitted(experts, beside, tokens, held_out, **options):
    recipe = Recipe(refit="least_squares", refit_options=options)
    return refit_down(experts, activation, recipe, tokens, held_out, beside=beside)


def with_targets_of(experts, beside, batch, noise=0.0, seed=9):
    """The batch with what experts and what is beside them give as targets, and noise."""
    output = slow_joint_features(experts, beside, batch) @ joint_down(experts, beside) + slow_constants(experts, batch)
    output += noise * torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(batch, targets=output.float())


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("names", FORMATS.values(), ids=FORMATS.keys())
def test_sums_are_those_of_all_features(names, kind):
    experts, beside = packed_experts(names, WIDTHS), beside_of(kind)
    batches = [tokens_of(n, seed=n) for n in (7, 1, 12)]
    sums = sum_features(experts, activation, batches, beside=beside)
    phi = torch.cat([slow_joint_features(experts, beside, batch) for batch in batches])
    target = torch.cat([slow_target(experts, batch) for batch in batches])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(sums.gram, phi.T @ phi, **close)
    torch.testing.assert_close(sums.cross, phi.T @ target, **close)
    assert sums.num_tokens == 20 and sums.energy == pytest.approx(target.square().sum().item())


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
@pytest.mark.parametrize("num_tokens", [90, 9])
def test_the_joint_fit_is_that_of_numpy(kind, start, ridge, num_tokens):
    experts, beside = packed_experts(FORMATS["gated-bias"], WIDTHS), beside_of(kind, start)
    batch = tokens_of(num_tokens)
    result = refitted(experts, beside, [batch], [], ridges=(ridge,))
    expected = slow_fit(experts, beside, batch, ridge)
    torch.testing.assert_close(joint_down(result.experts, result.beside), expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(result.beside.change, beside.change) and result.beside.widths == beside.widths


def test_what_both_can_express_is_recovered(kind):
    truth, beside = packed_experts(widths=WIDTHS), beside_of(kind, 1.0)
    tokens, held_out = (with_targets_of(truth, beside, tokens_of(n, seed=n)) for n in (200, 50))
    worse = dataclasses.replace(truth, down=truth.down + 1.0)
    result = refitted(worse, beside_of(kind), [tokens], [held_out], ridges=(1e-7,))
    assert result.is_refitted and result.error_after_refit < 1e-6 < 0.1 < result.error_before_refit
    torch.testing.assert_close(result.experts.down, truth.down, rtol=1e-2, atol=1e-2)
    learnable = slice(0, sum(KINDS[kind]) - (1 if KINDS[kind][1] else 0))  # the last slot is never chosen
    torch.testing.assert_close(result.beside.change[learnable], beside.change[learnable], rtol=1e-2, atol=1e-2)


def test_a_slot_that_no_token_chose_keeps_its_constant():
    result = refitted(packed_experts(widths=WIDTHS), beside_of(), [tokens_of(60)], [], ridges=(1e-3,))
    of_shared, of_constants = result.beside.changes
    assert of_shared.shape == (SHARED, HIDDEN) and of_constants.shape == (DROPPED, HIDDEN)
    assert not of_constants[-1].any() and of_constants[:-1].any(1).all() and of_shared.any(1).all()


def test_errors_are_those_on_held_out_tokens_and_it_is_never_worse(monkeypatch):
    monkeypatch.setattr(sinks, "MOST_ENERGY", float("inf"))  # all tokens count as they are
    for seed in range(10):
        experts, beside = packed_experts(widths=WIDTHS, seed=seed), beside_of()
        truth = packed_experts(widths=WIDTHS, seed=seed + 50)
        tokens = with_targets_of(truth, beside_of(change=1.0), tokens_of(2 + 4 * seed, seed=seed), noise=4.0)
        held_out = with_targets_of(truth, beside_of(change=1.0), tokens_of(40, seed=90 + seed))
        result = refitted(experts, beside, [tokens], [held_out])
        before = error(experts, beside, held_out)
        after = error(result.experts, result.beside, held_out)
        assert after <= before and result.is_refitted == (after < before)
        energy = slow_target(experts, held_out).square().sum().item()
        assert result.error_before_refit == pytest.approx(before / energy, rel=1e-3)
        if result.is_refitted:
            assert result.error_after_refit == pytest.approx(after / energy, rel=1e-3)


@pytest.mark.parametrize("is_large", [False, True])
def test_a_fit_that_held_out_tokens_contradict_leaves_both_alone(is_large, monkeypatch):
    if is_large:
        monkeypatch.setattr(fit, "MOST_JOINT_NEURONS", NEURONS + SHARED)  # the constants are too many
    experts, beside = packed_experts(widths=WIDTHS), beside_of(change=0.5)
    true = with_targets_of(experts, beside, tokens_of(40, seed=3), 0.01)
    told = with_targets_of(experts, beside, tokens_of(40))
    lying = dataclasses.replace(told, targets=-told.targets)
    result = refitted(experts, beside, [lying], [true], ridges=(1e-3,))
    assert not result.is_refitted and result.experts is experts and result.beside is beside
    assert result.error_after_refit > result.error_before_refit


def test_passes_find_the_joint_solution(kind, monkeypatch):
    monkeypatch.setattr("hf_mcsmoe.layer.refit_by_passes.TOLERANCE", 1e-7)
    monkeypatch.setattr("hf_mcsmoe.layer.refit_by_passes.MAX_ITERATIONS", 200)
    experts, beside = packed_experts(FORMATS["gated-bias"], WIDTHS), beside_of(kind, 0.5)
    batches = [tokens_of(n, seed=n) for n in (50, 31)]
    found = refit_by_passes(experts, activation, batches, 1e-2, beside)
    (together,) = in_chunks(batches)
    expected = slow_fit(experts, beside, together, 1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_above_the_limit_it_goes_by_passes_with_the_same_guard(monkeypatch):
    truth, beside = packed_experts(widths=WIDTHS), beside_of(change=1.0)
    tokens, held_out = (with_targets_of(truth, beside, tokens_of(n, seed=n)) for n in (200, 50))
    worse = dataclasses.replace(truth, down=truth.down + 1.0)
    joint = refitted(worse, beside_of(), [tokens], [held_out], ridges=(1e-2,))
    monkeypatch.setattr(fit, "MOST_JOINT_NEURONS", NEURONS)
    monkeypatch.setattr("hf_mcsmoe.layer.refit_by_passes.TOLERANCE", 1e-6)
    monkeypatch.setattr("hf_mcsmoe.layer.refit_by_passes.MAX_ITERATIONS", 200)
    passes = refitted(worse, beside_of(), [tokens], [held_out], ridges=(1e-2,))
    assert passes.is_refitted
    assert passes.error_before_refit == pytest.approx(joint.error_before_refit, rel=1e-3)
    assert passes.error_after_refit == pytest.approx(joint.error_after_refit, rel=1e-2)
    torch.testing.assert_close(passes.beside.change, joint.beside.change, rtol=1e-2, atol=1e-2)


def test_the_changes_outputs_are_those_of_the_slow_features(kind):
    beside, batch = beside_of(kind, 1.0), tokens_of(30)
    nothing = packed_experts(widths=(0, 0, 0, 0))
    expected = slow_joint_features(nothing, beside, batch) @ beside.change.double()
    torch.testing.assert_close(beside.output(batch), expected.float(), rtol=1e-4, atol=1e-5)
    ends = {"both": [NEURONS, NEURONS + SHARED, NEURONS + SHARED + DROPPED], "shared": [NEURONS, NEURONS + SHARED]}
    offsets = joint_offsets(packed_experts(widths=WIDTHS), beside)
    assert offsets == [0, 4, 4, 7, *ends.get(kind, [NEURONS, NEURONS + DROPPED])]


def test_gates_of_dropped_slots_are_cut_and_joined_with_their_tokens(monkeypatch):
    monkeypatch.setattr(token_batches, "CHUNK_TOKENS", 5)
    batches = [tokens_of(n, seed=n) for n in (7, 1, 12, 2)]
    whole = torch.cat([batch.dropped_gates for batch in batches])
    chunks = list(in_chunks(batches))
    assert max(len(chunk.gates) for chunk in chunks) <= 5 and len(chunks) < 8
    assert torch.equal(torch.cat([chunk.dropped_gates for chunk in chunks]), whole)
    experts = packed_experts(widths=WIDTHS)
    cut = sum_features(experts, activation, batches, beside=beside_of())
    monkeypatch.undo()
    expected = sum_features(experts, activation, batches, beside=beside_of()).gram
    torch.testing.assert_close(cut.gram, expected, rtol=1e-4, atol=1e-4)


def test_selection_and_refit_work_together_with_what_is_beside():
    experts = packed_experts(widths=(12, 8, 16, 4))
    truth = beside_of(change=0.5)
    tokens, held_out = (with_targets_of(experts, truth, tokens_of(n, seed=n)) for n in (300, 100))
    errors = {}
    for name, beside in (("alone", None), ("together", beside_of())):
        recipe = Recipe(selection="gated_obs", refit="least_squares")
        result = fit_experts(experts, activation, recipe, 30, [tokens], [held_out], beside=beside)
        assert result.experts.num_neurons == 30
        errors[name] = result.error_after_refit
    assert errors["together"] < 0.8 * errors["alone"]


def test_matching_is_asked_for_what_is_left_and_the_refit_for_all(kind):
    beside, batches = beside_of(kind, 1.0), [tokens_of(n, seed=n) for n in (9, 4)]
    tokens = MatchingTokens(batches, beside=beside)
    targets = torch.cat([batch.targets for batch in batches])
    left = targets - torch.cat([beside.output(batch) for batch in batches])
    index = torch.tensor([11, 0, 3])
    torch.testing.assert_close(tokens.batch(index).targets, left[index])
    assert (left - targets).abs().max() > 0.1
    whole = tokens.batches()
    torch.testing.assert_close(torch.cat([batch.targets for batch in whole]), targets)
    gates = torch.cat([batch.dropped_gates for batch in batches])
    assert torch.equal(torch.cat([batch.dropped_gates for batch in whole]), gates)
