"""resmoe, d2-moe and molae: slow references from their formulas, budgets, FLOPs, and whole models."""

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from hf_mcsmoe import compress_moe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.executors.in_memory import collect
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.observation.layer_tokens import original_tokens
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.shared_base import SHARED_BASE
from hf_mcsmoe.shared_base.whitened_deltas import grams_of_experts
from hf_mcsmoe.solvers.barycentre import align_to_barycentre, mean_of_aligned
from hf_mcsmoe.types import ExpertWeights, LayerStatistics

MODELS = {"mixtral": {}, "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4}}
PRESET_NAMES = ("resmoe", "d2-moe", "d2-moe-frequency", "molae")
RULES = {"aligned_residuals": "base", "whitened_deltas": "base", "fisher_whitened_deltas": "base"}
RULES |= {"latent_projection": "projection", "whitened_latent_projection": "projection"}


def weights_of(layer):
    stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
    return layer.family.view(layer, stacked)


def random_weights(num_experts=4, width=5, hidden=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    up, gate = (torch.randn(num_experts, width, hidden, generator=generator) for _ in range(2))
    return ExpertWeights(up=up, gate=gate, down=torch.randn(num_experts, hidden, width, generator=generator))


@pytest.fixture(scope="module", params=MODELS)
def case(request, original, tokens):
    """(second layer of a tiny model, its experts, usage, kept tokens)."""
    model = original(request.param, **MODELS[request.param])
    layers = find_layers(model)
    data = load_calibration(tokens, None, held_out_fraction=0)
    found = collect(model, layers, data, frozenset(), calibration_tokens=10**6, progress=False)
    collected = found[layers[1].name]
    usage = collected.statistics.usage_frequency
    return layers[1], weights_of(layers[1]), usage, original_tokens(layers[1], collected)


# --- references: loops over experts and numpy, from the formulas


def slow_order(weights, shares, first):
    """ResMoE: alternate one assignment for each expert and the mean, starting at one expert."""
    designs = [
        np.concatenate([weights.gate[e].numpy(), weights.up[e].numpy(), weights.down[e].numpy().T], axis=1)
        for e in range(weights.num_experts)
    ]
    base, orders = designs[first], None
    for _ in range(10):
        new = []
        for design in designs:
            distance = ((base[:, None] - design[None]) ** 2).sum(-1)
            new.append(linear_sum_assignment(distance)[1].tolist())
        if new == orders:
            break
        orders = new
        base = sum(share * design[order] for share, design, order in zip(shares, designs, orders, strict=True))
    return orders


def in_order(weights, name, expert, order):
    matrix = getattr(weights, name)[expert].double().numpy()
    return matrix[:, order] if name == "down" else matrix[order]


def best_of_rank(matrix, rank):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def slow_grams(weights, tokens, ridge):
    """For each expert and matrix the sum of x x^T over its tokens, one token after the other, with the ridge."""
    count, hidden, width = weights.num_experts, weights.up.shape[2], weights.width
    inward, outward = np.zeros((count, hidden, hidden)), np.zeros((count, width, width))
    for batch in tokens.calibration:
        for x, gates in zip(batch.hidden_states.double().numpy(), batch.gates.numpy(), strict=True):
            for expert in np.nonzero(gates)[0]:
                inward[expert] += np.outer(x, x)
                g, u = weights.gate[expert].double().numpy() @ x, weights.up[expert].double().numpy() @ x
                a = g / (1 + np.exp(-g)) * u
                outward[expert] += np.outer(a, a)
    found = {}
    for name, sums in (("up", inward), ("down", outward)):
        mean_energy = np.mean([np.trace(one) / len(one) for one in sums])
        found[name] = sums + ridge * mean_energy * np.eye(sums.shape[1])
    return found | {"gate": found["up"]}


def dense(shared):
    """The matrices of a rule's result, (N, O, I) each, in float64."""
    if hasattr(shared, "bases"):
        return {
            name: torch.stack([base.double() + one.dense().double() for one in shared.factors[name]]).numpy()
            for name, base in shared.bases.items()
        }
    found = {name: (shared.latent[name].double() @ shared.inward.double()).numpy() for name in ("gate", "up")}
    return found | {"down": (shared.outward.double() @ shared.latent["down"].double()).numpy()}


def call(rule, weights, keep, usage=None, tokens=None, statistics=None, **options):
    supply = {"importance": lambda: usage, "tokens": lambda: tokens, "statistics": lambda: statistics}
    return SHARED_BASE.call(rule, weights, keep, options=options, supply=supply)


def test_resmoe_is_the_svd_of_what_differs_from_the_barycentre(case):
    _, weights, usage, _ = case
    count, width, hidden = weights.up.shape
    shared = call("aligned_residuals", weights, 0.5, usage)
    rank = int((count * 0.5 - 1) / count * width * hidden / (width + hidden))
    assert shared.factors["up"][0].rank == rank
    orders = slow_order(weights, [1 / count] * count, int(usage.argmax()))
    got = dense(shared)
    for name in ("gate", "up", "down"):
        aligned = [in_order(weights, name, e, order) for e, order in enumerate(orders)]
        base = sum(aligned) / count
        for expert, matrix in enumerate(aligned):
            expected = base + best_of_rank(matrix - base, rank)
            np.testing.assert_allclose(got[name][expert], expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("aligned", [True, False])
def test_d2_moe_is_the_whitened_svd_of_what_differs_from_the_weighted_mean(case, aligned):
    _, weights, usage, tokens = case
    count, width, hidden = weights.up.shape
    shared = call("whitened_deltas", weights, 0.45, usage, tokens, ridge=0.05, iterations=10 if aligned else 0)
    rank = int((count * 0.45 - 1) / count * width * hidden / (width + hidden))
    orders = slow_order(weights, usage.tolist(), int(usage.argmax())) if aligned else [list(range(width))] * count
    grams, got = slow_grams(weights, tokens, 0.05), dense(shared)
    for name in ("gate", "up", "down"):
        matrices = [in_order(weights, name, e, order) for e, order in enumerate(orders)]
        base = sum(share * matrix for share, matrix in zip(usage.tolist(), matrices, strict=True))
        for expert, matrix in enumerate(matrices):
            gram = grams[name][expert]
            if name == "down":
                gram = gram[np.ix_(orders[expert], orders[expert])]
            root = np.linalg.cholesky(gram)
            expected = base + best_of_rank((matrix - base) @ root, rank) @ np.linalg.inv(root)
            np.testing.assert_allclose(got[name][expert], expected, rtol=1e-2, atol=1e-3)


def test_d2_moe_weighs_each_number_of_the_base_by_its_fisher_information(case):
    _, weights, usage, tokens = case
    count, width, hidden = weights.up.shape
    generator = torch.Generator().manual_seed(5)
    fisher = torch.rand(count, 3 * width * hidden, generator=generator)
    fisher[:, :7] = 0  # nobody knows of these
    fisher[1] = 0  # never used
    statistics = LayerStatistics(1, torch.ones(count, dtype=torch.int64), {"fisher": fisher})
    shared = call("fisher_whitened_deltas", weights, 0.45, usage, tokens, statistics, ridge=0.05)
    orders = slow_order(weights, usage.tolist(), int(usage.argmax()))
    rank = int((count * 0.45 - 1) / count * width * hidden / (width + hidden))
    grams, got, start = slow_grams(weights, tokens, 0.05), dense(shared), 0
    for name in weights.tensors():
        shape = getattr(weights, name)[0].shape
        of_name = fisher[:, start : start + shape.numel()].double().numpy().reshape(count, *shape)
        start += shape.numel()
        turned = [f[:, order] if name == "down" else f[order] for f, order in zip(of_name, orders, strict=True)]
        matrices = [in_order(weights, name, e, order) for e, order in enumerate(orders)]
        base = np.zeros(shape)
        for place in np.ndindex(*shape):
            weight = [one[place] for one in turned]
            weight = weight if sum(weight) > 0 else usage.tolist()
            base[place] = sum(w * m[place] for w, m in zip(weight, matrices, strict=True)) / sum(weight)
        np.testing.assert_allclose(shared.bases[name].numpy(), base, rtol=1e-4, atol=1e-5)
        for expert, matrix in enumerate(matrices):
            gram = grams[name][expert]
            if name == "down":
                gram = gram[np.ix_(orders[expert], orders[expert])]
            root = np.linalg.cholesky(gram)
            expected = base + best_of_rank((matrix - base) @ root, rank) @ np.linalg.inv(root)
            np.testing.assert_allclose(got[name][expert], expected, rtol=1e-2, atol=2e-3)
    plain = call("whitened_deltas", weights, 0.45, usage, tokens)
    fisher = usage[:, None].expand(-1, fisher.shape[1])  # as if all numbers of an expert mattered the same
    statistics = LayerStatistics(1, torch.ones(count, dtype=torch.int64), {"fisher": fisher})
    same = call("fisher_whitened_deltas", weights, 0.45, usage, tokens, statistics)
    for name, base in plain.bases.items():
        torch.testing.assert_close(same.bases[name], base, rtol=1e-4, atol=1e-6)


def test_molae_is_the_svd_of_the_stacked_matrices(case):
    _, weights, _, _ = case
    count, width, hidden = weights.up.shape
    shared = call("latent_projection", weights, 0.5)
    size = int(0.5 * 3 * count * width * hidden / (3 * count * width + 2 * hidden))
    assert shared.inward.shape == (size, hidden) and shared.outward.shape == (hidden, size)
    got = dense(shared)
    stack = np.concatenate([weights.gate.flatten(0, 1).numpy(), weights.up.flatten(0, 1).numpy()]).astype(float)
    expected = best_of_rank(stack, size).reshape(2, count, width, hidden)
    np.testing.assert_allclose(np.stack([got["gate"], got["up"]]), expected, rtol=1e-3, atol=1e-5)
    beside = np.concatenate(list(weights.down.double().numpy()), axis=1)
    expected = best_of_rank(beside, size).reshape(hidden, count, width).transpose(1, 0, 2)
    np.testing.assert_allclose(got["down"], expected, rtol=1e-3, atol=1e-5)


def test_whitened_molae_is_the_best_for_the_outputs(case):
    _, weights, _, tokens = case
    count, width, hidden = weights.up.shape
    got = dense(call("whitened_latent_projection", weights, 0.5, tokens=tokens, ridge=0.05))
    size = int(0.5 * 3 * count * width * hidden / (3 * count * width + 2 * hidden))
    grams = slow_grams(weights, tokens, 0.05)
    root = np.linalg.cholesky(grams["up"].sum(0))
    stack = np.concatenate([weights.gate.flatten(0, 1).numpy(), weights.up.flatten(0, 1).numpy()]).astype(float)
    basis = np.linalg.svd(stack @ root)[2][:size] @ np.linalg.inv(root)  # rows of B
    beside = [weights.down[e].double().numpy() @ np.linalg.cholesky(grams["down"][e]) for e in range(count)]
    outward = np.linalg.svd(np.concatenate(beside, axis=1))[0][:, :size]
    for expert in range(count):
        own = np.linalg.cholesky(grams["up"][expert])
        for name in ("gate", "up"):
            matrix = getattr(weights, name)[expert].double().numpy()
            fitted = np.linalg.lstsq((basis @ own).T, (matrix @ own).T, rcond=None)[0].T
            np.testing.assert_allclose(got[name][expert], fitted @ basis, rtol=1e-2, atol=1e-3)
        expected = outward @ outward.T @ weights.down[expert].double().numpy()
        np.testing.assert_allclose(got["down"][expert], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("rule", ["aligned_residuals", "latent_projection"])
def test_half_precision_gives_the_float32_matrices_but_for_rounding(rule, case):
    _, weights, usage, _ = case
    narrow = ExpertWeights(**{name: t.bfloat16() for name, t in weights.tensors().items()})
    wide = ExpertWeights(**{name: t.float() for name, t in narrow.tensors().items()})
    for name, expected in dense(call(rule, wide, 0.5, usage)).items():
        # Rounding may swap singular vectors of nearly equal values, so single numbers are not compared.
        difference = dense(call(rule, narrow, 0.5, usage))[name] - expected
        assert np.linalg.norm(difference) < 2**-5 * np.linalg.norm(expected)


# --- alignment


def test_orders_are_the_best_for_the_barycentre_of_all_orders():
    weights, shares = random_weights(width=4), torch.tensor([0.1, 0.4, 0.3, 0.2])
    order = align_to_barycentre(weights, shares, 1, 50)
    parts = mean_of_aligned(weights, order, shares)
    for expert in range(4):

        def distance(places, expert=expert):
            total = 0.0
            for name, (base, _) in parts.items():
                matrix = getattr(weights, name)[expert]
                moved = matrix[:, list(places)] if name == "down" else matrix[list(places)]
                total += (moved - base).square().sum().item()
            return total

        best = min(itertools.permutations(range(4)), key=distance)
        assert distance(order[expert].tolist()) == pytest.approx(distance(best), rel=1e-6)


def test_more_iterations_never_raise_the_distance_to_the_barycentre():
    weights, shares = random_weights(6, 12, 5, seed=3), torch.full((6,), 1 / 6)
    distances = []
    for iterations in range(6):
        parts = mean_of_aligned(weights, align_to_barycentre(weights, shares, 0, iterations), shares)
        distances.append(sum(((aligned - base) ** 2).sum().item() for base, aligned in parts.values()))
    assert distances[1] < distances[0]
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(distances[1:]))


@pytest.mark.parametrize("rule", ["aligned_residuals", "whitened_deltas"])
def test_shuffled_copies_of_one_expert_need_nothing_but_the_base(rule, case):
    _, weights, usage, tokens = case
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(weights.width, generator=generator) for _ in range(weights.num_experts)])
    one = {name: t[:1].expand(weights.num_experts, *t.shape[1:]) for name, t in weights.tensors().items()}
    copies = ExpertWeights(**one).permute_neurons(order)
    shared = call(rule, copies, 0.4, usage, tokens)
    for name, base in shared.bases.items():
        # Some order of the neurons of the one expert, the same for all matrices and all experts.
        moved = base.double().sort(dim=1 if name == "down" else 0).values
        found = getattr(weights, name)[0].double().sort(dim=1 if name == "down" else 0).values
        torch.testing.assert_close(moved, found, rtol=1e-4, atol=1e-6)
        assert max(factor.dense().abs().max() for factor in shared.factors[name]) < 1e-5


def test_no_usage_weighs_all_alike_and_no_token_is_the_plain_svd(case):
    layer, weights, usage, tokens = case
    nothing = copy.copy(tokens)
    object.__setattr__(nothing, "calibration", [])
    plain = call("aligned_residuals", weights, 0.5, torch.zeros_like(usage))
    got = call("whitened_deltas", weights, 0.5, torch.zeros_like(usage), nothing)
    for name, matrices in dense(plain).items():
        np.testing.assert_allclose(dense(got)[name], matrices, rtol=1e-4, atol=1e-5)
    plain = call("latent_projection", weights, 0.5)
    got = call("whitened_latent_projection", weights, 0.5, tokens=nothing)
    for name, matrices in dense(plain).items():
        np.testing.assert_allclose(dense(got)[name], matrices, rtol=1e-4, atol=1e-5)
    assert layer.num_slots == len(usage)


def test_memory_of_the_grams_is_that_of_the_docstring(case):
    _, weights, _, tokens = case
    grams = {id(gram): gram for of_expert in grams_of_experts(weights, tokens).values() for gram in of_expert}
    count, width, hidden = weights.up.shape
    assert sum(gram.numel() for gram in grams.values()) == count * (hidden**2 + width**2)
    assert {gram.dtype for gram in grams.values()} == {torch.float64}


# --- whole models


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("family", MODELS)
def test_presets_lose_less_the_more_they_keep_and_nothing_at_all_at_one(preset, family, original, tokens, prompt):
    model = original(family, **MODELS[family])
    with torch.no_grad():
        expected = model(prompt).logits
    errors = []
    for keep in (0.35, 0.8, 1.0):
        result = original(family, **MODELS[family])
        result = compress_moe(result, recipe_from_preset(preset, keep=keep), calibration=tokens, progress=False)
        errors.append(np.mean([r.relative_error for r in result.compression_report.layers]))
        with torch.no_grad():
            found = result(prompt).logits
    assert errors[0] > errors[1] > errors[2] == 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_the_order_of_neurons_and_padding_do_not_matter(preset, original, tokens, prompt):
    recipe, results = recipe_from_preset(preset, keep=0.5), []
    mask = torch.ones(24, 23, dtype=torch.int64)
    mask[:, 20:] = 0
    padded = {"input_ids": torch.cat([tokens, torch.zeros(24, 3, dtype=torch.int64)], 1), "attention_mask": mask}
    for shuffle, data in ((False, tokens), (True, tokens), (False, [padded])):
        model = original("mixtral")
        for layer in find_layers(model) if shuffle else []:
            generator = torch.Generator().manual_seed(1)
            order = torch.stack([torch.randperm(40, generator=generator) for _ in range(8)])
            moved = layer.family.unview(layer, weights_of(layer).permute_neurons(order))
            for name, tensor in moved.items():
                layer.expert_parameters[name].data.copy_(tensor)
        result = compress_moe(model, recipe, calibration=data, progress=False)
        with torch.no_grad():
            results.append(result(prompt).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=2e-2, atol=2e-2)  # other batches, other held-out rows


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_few_tokens_and_half_precision_are_finite(preset, original, tokens, prompt):
    for data in (tokens[:1, :2], tokens):
        model = original("qwen3_moe").bfloat16()
        result = compress_moe(model, recipe_from_preset(preset, keep=0.5), calibration=data, progress=False)
        with torch.no_grad():
            assert result(prompt).logits.isfinite().all()
        assert all(p.dtype == torch.bfloat16 for p in result.parameters())
