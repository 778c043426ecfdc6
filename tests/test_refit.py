"""Refit of down projections, against least squares of numpy on the stacked features."""

import dataclasses

import numpy as np
import pytest
import torch
from fit_layers import FORMATS, HIDDEN, activation, packed_experts, routed, slow_constants, slow_features, slow_outputs
from fit_layers import with_targets_of as targets_of

from hf_mcsmoe.layer.fit import fit_experts, refit_down
from hf_mcsmoe.observation.gated_features import FeatureSums
from hf_mcsmoe.observation.token_batches import RoutedTokens
from hf_mcsmoe.recipe import Recipe
from hf_mcsmoe.refit.least_squares import RIDGES, mean_energies, refit_by_least_squares

WIDTHS = (4, 0, 3, 5)
NEURONS = sum(WIDTHS)


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def experts(request):
    return packed_experts(request.param, WIDTHS)


def slow_sums(experts, tokens):
    phi, target = slow_features(experts, tokens), tokens.targets.double() - slow_constants(experts, tokens)
    return FeatureSums(phi.T @ phi, phi.T @ target, target.square().sum().item(), len(target))


def slow_error(experts, tokens):
    def of_columns(down, columns):
        phi, target = slow_features(experts, tokens), tokens.targets.double() - slow_constants(experts, tokens)
        return (target[:, columns] - phi @ down).square().sum().item()

    return of_columns


def fit(experts, tokens, held_out=None, **options):
    sums = slow_sums(experts, tokens)
    others = slow_error(experts, held_out) if held_out is not None else None
    return refit_by_least_squares(sums, others, experts.offsets.tolist(), experts.down.double(), **options)


def refitted(experts, tokens, held_out, **options):
    recipe = Recipe(refit="least_squares", refit_options=options)
    return refit_down(experts, activation, recipe, [tokens], [] if held_out is None else [held_out])


def slow_fit(experts, tokens, ridge):
    """numpy's least squares of |y - phi down|^2 + sum_e ridge_e |down_e - down0_e|^2 as one stack of rows."""
    phi = slow_features(experts, tokens).numpy()
    target = (tokens.targets.double() - slow_constants(experts, tokens)).numpy()
    squares, roots = (phi**2).sum(0), np.zeros(NEURONS)
    for start, end in zip(experts.offsets[:-1].tolist(), experts.offsets[1:].tolist(), strict=True):
        if end > start:
            own = squares[start:end].mean()
            roots[start:end] = (ridge * (own if own > 0 else squares.mean())) ** 0.5
    down = experts.down.double().numpy()
    rows, wanted = np.concatenate([phi, np.diag(roots)]), np.concatenate([target, roots[:, None] * down])
    return torch.from_numpy(np.linalg.lstsq(rows, wanted, rcond=None)[0])


def error(experts, down, batch):
    residual = batch.targets.double() - slow_constants(experts, batch) - slow_features(experts, batch) @ down.double()
    return residual.square().sum().item()


def changed(experts, seed=7):
    """The same inner matrices with other down projections."""
    noise = torch.randn(experts.down.shape, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(experts, down=experts.down + noise)


@pytest.mark.parametrize("num_tokens", [60, 12, 5, 1])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 10.0])
def test_the_fit_is_that_of_numpy(experts, ridge, num_tokens):
    tokens = routed(num_tokens, len(WIDTHS))
    fitted = fit(experts, tokens, ridges=(ridge,))
    assert fitted.dtype == torch.float64
    torch.testing.assert_close(fitted, slow_fit(experts, tokens, ridge), rtol=1e-6, atol=1e-8)
    assert error(experts, fitted, tokens) <= error(experts, experts.down, tokens) * (1 + 1e-9)


def test_it_recovers_what_the_features_can_express(experts):
    tokens = targets_of(experts, routed(80, len(WIDTHS)))
    held_out = targets_of(experts, routed(30, len(WIDTHS), seed=3))
    worse = changed(experts)
    result = refitted(worse, tokens, held_out, ridges=(1e-7,))
    assert result.is_refitted and result.error_after_refit < 1e-6 < 0.1 < result.error_before_refit
    torch.testing.assert_close(result.experts.down, experts.down, rtol=1e-3, atol=1e-3)


def test_a_large_ridge_returns_the_weights_that_were_there(experts):
    tokens = routed(60, len(WIDTHS))
    torch.testing.assert_close(fit(experts, tokens, ridges=(1e9,)), experts.down.double(), rtol=0, atol=1e-6)


def test_the_ridge_is_the_one_with_the_least_held_out_error():
    experts = packed_experts(widths=WIDTHS)
    for noise in (0.0, 3.0):
        tokens = targets_of(changed(experts), routed(20, len(WIDTHS)), noise)
        held_out = targets_of(changed(experts), routed(50, len(WIDTHS), seed=3))
        candidates = {ridge: slow_fit(experts, tokens, ridge) for ridge in RIDGES}
        errors = {ridge: error(experts, down, held_out) for ridge, down in candidates.items()}
        best = min(errors, key=errors.get)
        assert best == min(RIDGES) if noise == 0 else best >= 1
        torch.testing.assert_close(fit(experts, tokens, held_out), candidates[best], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("best", sorted(RIDGES))
def test_whatever_ridge_is_best_is_found_by_some_columns_of_the_output(best):
    generator = torch.Generator().manual_seed(0)
    phi, target = (torch.randn(30, n, generator=generator, dtype=torch.float64) for n in (5, 200))
    down = torch.randn(5, 200, generator=generator, dtype=torch.float64)
    sums, asked = FeatureSums(phi.T @ phi, phi.T @ target, 0.0, 30), []
    solution_of_ridge = {
        ridge: refit_by_least_squares(sums, None, [0, 5], down, ridges=(ridge,)) for ridge in sorted(RIDGES)
    }

    def distance(candidate, columns):
        assert candidate.shape[1] < 100 and candidate.shape == down[:, columns].shape
        asked.append(candidate)
        (ridge,) = [r for r, full in solution_of_ridge.items() if torch.allclose(full[:, columns], candidate)]
        return abs(RIDGES.index(ridge) - RIDGES.index(best))

    fitted = refit_by_least_squares(sums, distance, [0, 5], down)
    torch.testing.assert_close(fitted, solution_of_ridge[best], rtol=1e-12, atol=1e-12)
    assert len(asked) < len(RIDGES)


def test_without_held_out_tokens_the_largest_ridge_is_taken():
    experts, tokens = packed_experts(widths=WIDTHS), routed(20, len(WIDTHS))
    result = refitted(experts, tokens, None)
    torch.testing.assert_close(
        result.experts.down.double(), slow_fit(experts, tokens, max(RIDGES)), rtol=1e-4, atol=1e-4
    )
    assert result.is_refitted and result.error_before_refit is None and result.error_after_refit is None


def test_the_errors_are_relative_ones_on_held_out_tokens(experts):
    tokens, held_out = (targets_of(changed(experts), routed(n, len(WIDTHS), seed=n), 0.1) for n in (60, 25))
    result = refitted(experts, tokens, held_out)
    energy = (held_out.targets.double() - slow_constants(experts, held_out)).square().sum().item()
    assert result.error_before_refit == pytest.approx(error(experts, experts.down, held_out) / energy, rel=1e-3)
    assert result.error_after_refit == pytest.approx(error(experts, result.experts.down, held_out) / energy, rel=1e-3)
    assert result.is_refitted and result.error_after_refit < result.error_before_refit


def test_a_fit_that_held_out_tokens_contradict_is_dropped(experts):
    true = targets_of(experts, routed(40, len(WIDTHS), seed=3), 0.01)
    flipped = targets_of(experts, routed(40, len(WIDTHS)))
    lying = RoutedTokens(flipped.hidden_states, flipped.gates, -flipped.targets)
    result = refitted(experts, lying, true)
    assert not result.is_refitted and result.experts is experts
    assert result.error_after_refit > result.error_before_refit


def test_it_is_never_worse_on_held_out_tokens():
    for seed in range(12):
        experts = packed_experts(widths=WIDTHS, seed=seed)
        tokens = targets_of(changed(experts), routed(1 + 2 * seed, len(WIDTHS), seed=seed), noise=4.0)
        held_out = targets_of(changed(experts), routed(30, len(WIDTHS), seed=50 + seed))
        result = refitted(experts, tokens, held_out)
        before, after = (error(experts, down, held_out) for down in (experts.down, result.experts.down))
        assert after <= before
        assert result.is_refitted == (after < before)


def test_experts_that_no_token_reached_stay_and_rare_ones_stay_near():
    experts = changed(packed_experts(widths=(4, 3, 5)))
    truth = packed_experts(widths=(4, 3, 5))
    tokens = routed(300, 3)
    tokens.gates[:, 1] = 0  # never
    tokens.gates[1:, 2] = 0
    tokens.gates[0, 2] = 0.5  # once
    tokens = targets_of(truth, tokens)
    fitted = fit(experts, tokens, ridges=(1e-2,))
    torch.testing.assert_close(fitted[4:7], experts.down[4:7].double(), rtol=0, atol=0)
    moved = (fitted - experts.down.double()).norm(dim=1)
    needed = (truth.down - experts.down).double().norm(dim=1)
    assert (moved[:4] > 0.5 * needed[:4]).all()
    # One token moves its expert in one direction of the features only, so neurons are not carried to the truth.
    assert torch.linalg.matrix_rank(fitted[7:] - experts.down[7:].double(), rtol=1e-6) == 1
    assert (fitted[7:] - truth.down[7:].double()).norm() > 0.5 * needed[7:].norm()


def test_the_scale_of_an_expert_does_not_change_how_strongly_it_is_held():
    experts = packed_experts(widths=WIDTHS)
    tokens = routed(20, len(WIDTHS))
    fitted = fit(experts, tokens, ridges=(1e-2,))
    gates = tokens.gates * torch.tensor([1.0, 1.0, 1e-3, 1e3])
    scale = torch.tensor([1.0] * 4 + [1e3] * 3 + [1e-3] * 5)[:, None]
    scaled = dataclasses.replace(experts, down=experts.down * scale)
    moved = fit(scaled, RoutedTokens(tokens.hidden_states, gates, tokens.targets), ridges=(1e-2,))
    torch.testing.assert_close(moved / scale, fitted, rtol=1e-4, atol=1e-5)


def test_constants_after_down_are_not_fitted_but_taken_off_the_target():
    experts = packed_experts(FORMATS["gated-bias"], WIDTHS)
    tokens = targets_of(experts, routed(60, len(WIDTHS)))
    result = refitted(changed(experts), tokens, tokens, ridges=(1e-7,))
    assert torch.equal(result.experts.down_bias, experts.down_bias)
    torch.testing.assert_close(slow_outputs(result.experts, tokens), tokens.targets.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_without_a_feature_the_weights_stay(num_tokens):
    experts = packed_experts(widths=WIDTHS)
    silent = RoutedTokens(torch.randn(num_tokens, HIDDEN), torch.zeros(num_tokens, 4), torch.ones(num_tokens, HIDDEN))
    for held_out in (None, silent, routed(9, 4)):
        result = refitted(experts, silent, held_out)
        assert torch.equal(result.experts.down, experts.down)


def test_held_out_targets_of_zero_say_nothing():
    experts, tokens = packed_experts(widths=WIDTHS), routed(20, 4)
    silent = RoutedTokens(tokens.hidden_states, tokens.gates * 0, tokens.targets * 0)
    result = refitted(experts, tokens, silent)
    assert result.error_before_refit is None and result.experts.down.isfinite().all()


def test_a_ridge_below_the_precision_of_the_sums_is_passed_over():
    experts = packed_experts(widths=WIDTHS)
    for name in ("up", "gate"):
        getattr(experts, name)[8:12] = getattr(experts, name)[7]  # five equal neurons: a Gram of rank 8
    tokens, held_out = (targets_of(changed(experts), routed(n, len(WIDTHS), seed=n)) for n in (30, 20))
    safe = fit(experts, tokens, held_out, ridges=(1e-3,))
    assert torch.equal(fit(experts, tokens, held_out, ridges=(1e-30, 1e-3)), safe)
    assert torch.equal(fit(experts, tokens, held_out, ridges=(1e-30,)), experts.down.double())


def test_energies_are_means_of_experts_and_of_all_for_silent_ones():
    gram = torch.diag(torch.tensor([1.0, 3.0, 0.0, 0.0, 8.0]))
    energies = mean_energies(gram, [0, 2, 2, 4, 5])
    torch.testing.assert_close(energies, torch.tensor([2.0, 2.0, 2.4, 2.4, 8.0]))
    assert not mean_energies(torch.zeros(2, 2), [0, 1, 2]).any()


@pytest.mark.parametrize("ridges", [(), (0.0,), (1e-3, -1.0)])
def test_ridges_must_be_positive(ridges):
    with pytest.raises(ValueError, match=r"^ridges is .* must hold positive numbers\. Leave it out"):
        fit(packed_experts(widths=WIDTHS), routed(9, 4), ridges=ridges)


# --- selection and refit together


@pytest.mark.parametrize("selection", ["gated_obs", "gated_energy"])
def test_a_refit_makes_up_for_neurons_that_are_gone(selection):
    experts = packed_experts(widths=(12, 8, 16))
    tokens, held_out = (targets_of(experts, routed(n, 3, seed=n)) for n in (300, 100))
    errors = {}
    for refit in (None, "least_squares"):
        recipe = Recipe(selection=selection, refit=refit)
        result = fit_experts(experts, activation, recipe, 18, [tokens], [held_out])
        assert result.experts.num_neurons == 18
        errors[refit] = error(result.experts, result.experts.down, held_out)
    assert errors["least_squares"] < 0.95 * errors[None]


def test_neurons_that_can_be_spared_go_and_nothing_is_lost():
    experts = packed_experts(widths=(4, 6))
    twice = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, *range(4, 10)])
    fields = {name: t[twice].clone() for name, t in experts.tensors().items()}
    fields["down"][:8] *= torch.tensor([0.3, 0.7] * 4)[:, None]  # two of the same share what one did
    doubled = dataclasses.replace(experts, offsets=torch.tensor([0, 8, 14]), **fields)
    tokens, held_out = (targets_of(doubled, routed(n, 2, seed=n)) for n in (200, 50))
    recipe = Recipe(selection="gated_obs", refit="least_squares", refit_options={"ridges": (1e-8,)})
    result = fit_experts(doubled, activation, recipe, 10, [tokens], [held_out])
    assert result.experts.widths.tolist() == [4, 6]
    torch.testing.assert_close(slow_outputs(result.experts, held_out), held_out.targets.double(), rtol=1e-3, atol=1e-4)
