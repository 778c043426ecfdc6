"""The Gauss-Newton step on inner matrices against a dense Jacobian from autograd in float64."""

import dataclasses

import pytest
import torch
from fit_layers import FORMATS, activation, packed_experts, routed, with_targets_of
from torch.testing import assert_close

from hf_mcsmoe import Recipe
from hf_mcsmoe.matching import gauss_newton
from hf_mcsmoe.matching.gauss_newton import Linearization, match_by_gauss_newton
from hf_mcsmoe.matching.tokens import MatchingTokens, held_out_error
from hf_mcsmoe.observation.sinks import with_bounded_sinks

WIDTHS = (4, 0, 3, 5)


@pytest.fixture(params=FORMATS)
def experts(request):
    return packed_experts(FORMATS[request.param], WIDTHS)


@pytest.fixture
def seen(experts):
    """No token goes to the last expert, and none asks for much more than the others."""
    batch = routed(60, len(WIDTHS))
    gates = torch.cat([batch.gates[:, :3], torch.zeros(60, 1)], dim=1)
    batch = with_targets_of(experts, dataclasses.replace(batch, gates=gates), noise=0.5)
    return with_bounded_sinks([batch])[0]


def inner(experts):
    names = ["up"] if experts.gate is None else ["up", "gate"]
    return torch.stack([getattr(experts, name) for name in names]).double()


def outputs(experts, batch, matrices):
    """(T, D) float64, all experts on all tokens; `matrices` are up and gate."""
    x, place = batch.hidden_states.double(), experts.expert_of_neuron
    biases = [getattr(experts, f"{name}_bias") for name in ("up", "gate")]
    answers = [x @ m.T + (0 if b is None else b.double()) for m, b in zip(matrices, biases, strict=False)]
    features = activation(answers[0], answers[1] if len(answers) > 1 else None) * batch.gates.double()[:, place]
    constant = 0 if experts.down_bias is None else batch.gates.double() @ experts.down_bias.double()
    return features @ experts.down.double() + constant


def dense_jacobian(experts, batch):
    """(T D, n P D)."""
    matrices = inner(experts)
    found = torch.autograd.functional.jacobian(lambda m: outputs(experts, batch, m), matrices)
    return found.reshape(batch.targets.numel(), matrices.numel())


def test_the_linear_map_and_its_transpose_are_those_of_the_jacobian(experts, seen):
    problem, jacobian = Linearization(experts, activation, MatchingTokens([seen])), dense_jacobian(experts, seen)
    (at,) = problem.curvature()
    change = torch.randn(inner(experts).shape, generator=torch.Generator().manual_seed(1))
    moved = (jacobian @ change.double().flatten()).reshape(seen.targets.shape)
    assert_close(problem.times(*at, change).double(), moved, rtol=1e-4, atol=1e-4)
    back = torch.zeros_like(change)
    problem.add_transposed(*at, seen.targets, back)
    expected = (jacobian.T @ seen.targets.double().flatten()).reshape(change.shape)
    assert_close(back.double(), expected, rtol=1e-4, atol=1e-4)


def test_enough_iterations_solve_the_damped_normal_equations(experts, seen):
    problem, jacobian = Linearization(experts, activation, MatchingTokens([seen])), dense_jacobian(experts, seen)
    residual = (seen.targets.double() - outputs(experts, seen, inner(experts))).flatten()
    normal = jacobian.T @ jacobian
    # The mean of the diagonal entries of each matrix, for inputs of mean energy that know nothing of the slopes.
    entries, _ = problem.diagonal()
    damping = 0.1 * entries.double().mean(1).flatten().repeat_interleave(inner(experts)[0].numel())
    expected = torch.linalg.solve(normal + damping.diag(), jacobian.T @ residual).reshape(inner(experts).shape)
    assert_close(problem.solve(200, 0.1).double(), expected, rtol=1e-3, atol=1e-4)
    first, last = (problem.solve(number, 0.1).double() - expected for number in (1, 8))
    assert last.norm() < 0.5 * first.norm() < 0.5 * expected.norm()


def test_the_diagonal_is_that_of_a_jacobian_whose_inputs_know_nothing_of_its_slopes(experts, seen):
    x = seen.hidden_states.double()
    entries, inputs = Linearization(experts, activation, MatchingTokens([seen])).diagonal()
    gram = x.T @ x
    assert_close(inputs.double(), gram / gram.diagonal().mean(), rtol=1e-5, atol=1e-6)
    matrices = inner(experts).requires_grad_()
    for place, row in enumerate(entries):
        features = torch.zeros(len(row), dtype=torch.float64)
        for token in range(len(x)):
            one = dataclasses.replace(
                seen,
                hidden_states=seen.hidden_states[[token]],
                gates=seen.gates[[token]],
                targets=seen.targets[[token]],
            )
            jacobian = dense_jacobian(experts, one).reshape(-1, *matrices.shape)[:, place]
            features += jacobian.square().sum((0, 2)) / x[token].square().sum()
        assert_close(row.flatten().double(), features * gram.diagonal().mean() / len(x), rtol=1e-4, atol=1e-5)


def test_the_curvature_of_some_tokens_goes_with_the_gradient_of_all(experts, seen):
    problem = Linearization(experts, activation, MatchingTokens([seen]), 3)
    some = dataclasses.replace(
        seen, hidden_states=seen.hidden_states[::3], gates=seen.gates[::3], targets=seen.targets[::3]
    )
    (some,) = with_bounded_sinks([some])
    jacobian, of_some = dense_jacobian(experts, seen), dense_jacobian(experts, some)
    residual = (seen.targets.double() - outputs(experts, seen, inner(experts))).flatten()
    entries, _ = problem.diagonal()
    damping = 0.1 * entries.double().mean(1).flatten().repeat_interleave(inner(experts)[0].numel())
    normal = of_some.T @ of_some + damping.diag()
    expected = torch.linalg.solve(3 * normal, jacobian.T @ residual).reshape(inner(experts).shape)
    assert_close(problem.solve(300, 0.1).double(), expected, rtol=1e-3, atol=1e-4)


def match(experts, seen, held_out=None, **options):
    tokens = MatchingTokens([seen]), MatchingTokens([held_out or seen])
    return match_by_gauss_newton(experts, activation, *tokens, seed=0, **options)


def test_the_error_falls_and_experts_that_no_token_reached_stay(experts, seen):
    matched = match(experts, seen)
    own = MatchingTokens([seen])
    assert held_out_error(matched, activation, own) < 0.9 * held_out_error(experts, activation, own)
    for name, tensor in experts.tensors().items():
        after = matched.tensors()[name]
        assert torch.equal(after, tensor) == (name not in ("up", "gate"))
        if name in ("up", "gate"):
            assert torch.equal(after[7:], tensor[7:])


def test_held_out_tokens_halve_or_refuse_the_step(experts, seen, monkeypatch):
    exact = dataclasses.replace(with_targets_of(experts, seen), hidden_states=seen.hidden_states)
    assert match(experts, seen, exact) is experts
    whole, half, quarter = (1.0, 0.5, 0.25)
    found = Linearization(experts, activation, MatchingTokens([seen])).solve(5, 0.1)
    for allowed in (whole, half, quarter):
        errors = iter([1.0, *[2.0] * [whole, half, quarter].index(allowed), 0.5])
        monkeypatch.setattr(gauss_newton, "held_out_error", lambda *_: next(errors))  # noqa: B023
        assert_close(match(experts, seen).up, experts.up + allowed * found[0])


def test_slopes_that_do_not_fit_are_computed_anew(experts, seen, monkeypatch):
    kept = match(experts, seen)
    monkeypatch.setattr(gauss_newton, "MOST_BYTES", 0)
    again = match(experts, seen)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in kept.tensors().items())


def test_tokens_that_ask_for_nothing_change_nothing(experts, seen):
    silent = dataclasses.replace(seen, gates=torch.zeros_like(seen.gates))
    assert match(experts, silent) is experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"ridge": 0}, "ridge is 0"),
        ({"curvature_every": 0}, "curvature_every is 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(refit="least_squares", matching="gauss_newton", matching_options=options)
