"""MergeMoE and PLeaS against their normal equations written out."""

import itertools

import pytest
import torch
from method_models import (
    MODELS,
    NUM_EXPERTS,
    assert_experts_close,
    cosines,
    experts_now,
    method_model,
    seen_by_layers,
    slow_m_smoe_groups,
)
from torch.nn.functional import silu

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.merging.least_squares_down import merge_by_least_squares_down
from hf_mcsmoe.merging.pleas import merge_by_permuted_least_squares
from hf_mcsmoe.observation.expert_activations import hidden_states_of
from hf_mcsmoe.observation.layer_tokens import LayerTokens
from hf_mcsmoe.observation.token_batches import RoutedTokens
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.similarity.inner_weights import inner_weight_similarity
from hf_mcsmoe.solvers.down_fit import solve, weighted_mean
from hf_mcsmoe.types import ExpertWeights

OPERATORS = {"merge-moe": merge_by_least_squares_down, "pleas": merge_by_permuted_least_squares}


def act(gate, up, x):
    return torch.stack([silu(gate @ t) * (up @ t) for t in x])  # (T, I)


def slow_fit(features, target, start, ridge):
    """argmin |W P - Y|^2 + r |W - start|^2 as one long least-squares problem; the pseudo-inverse for ridge 0."""
    if ridge == 0:
        return (torch.linalg.pinv(features) @ target).T
    width = features.shape[1]
    weight = (ridge * features.square().sum().item() / width) ** 0.5
    rows = torch.cat([features, weight * torch.eye(width, dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([target, weight * start.T])).solution.T


def slow_merge(weights, members, shares, x, ridge, features_of):
    """(gate, up, down) of one group; `features_of` is "merge-moe" or "pleas"."""
    if len(members) == 1:
        return [tensor[members[0]] for tensor in (weights.gate, weights.up, weights.down)]
    gate, up, down = (
        sum(s * tensor[e] for s, e in zip(shares, members, strict=True))
        for tensor in (weights.gate, weights.up, weights.down)
    )
    each = [act(weights.gate[e], weights.up[e], x) for e in members]
    target = sum(s * a @ weights.down[e].T for s, a, e in zip(shares, each, members, strict=True))
    features = (
        act(gate, up, x) if features_of == "merge-moe" else sum(s * a for s, a in zip(shares, each, strict=True))
    )
    return [gate, up, slow_fit(features, target, down, ridge)]


def in_order(weights, order, expert):
    tensors = {"gate": weights.gate.clone(), "up": weights.up.clone(), "down": weights.down.clone()}
    for name, tensor in tensors.items():
        tensor[expert] = tensor[expert][:, order] if name == "down" else tensor[expert][order]
    return ExpertWeights(**tensors)


def best_order(weights, leader, expert):
    """The permutation of least squared distance between all matrices, by trying all of them."""

    def distance(order):
        moved = in_order(weights, list(order), expert)
        return sum((t[leader] - t[expert]).square().sum().item() for t in moved.tensors().values())

    return list(min(itertools.permutations(range(weights.width)), key=distance))


@pytest.mark.parametrize("ridge", [1e-2, 0])
@pytest.mark.parametrize("name", MODELS)
def test_merge_moe_is_the_method_of_the_paper(name, ridge, tokens):
    model, half = method_model(name), NUM_EXPERTS[name] // 2
    seen = seen_by_layers(model, tokens)
    recipe = recipe_from_preset("merge-moe", merging_options={"ridge": ridge})
    compress_moe(model, recipe, calibration=load_calibration(tokens, held_out_fraction=0), progress=False)
    for of_layer, found, report in zip(seen, experts_now(model), model.compression_report.layers, strict=True):
        weights, count = of_layer.weights, of_layer.counts()
        flat = torch.cat([weights.up.flatten(1), weights.gate.flatten(1)], dim=1)
        groups = slow_m_smoe_groups(of_layer, cosines(flat), half)
        assert report.dominant_of_group == [members[0] for members in groups]
        expected = []
        for members in groups:
            shares = [count[e] / sum(count[m] for m in members) for e in members]
            expected.append(slow_merge(weights, members, shares, of_layer.inputs, ridge, "merge-moe"))
        gate, up, down = (torch.stack(one) for one in zip(*expected, strict=True))
        close = {"rtol": 2e-3, "atol": 2e-4} if ridge == 0 else {"rtol": 1e-3, "atol": 1e-5}
        assert_experts_close(found, ExpertWeights(gate=gate, up=up, down=down), **close)


@pytest.mark.parametrize("name", MODELS)
def test_pleas_is_a_permutation_and_a_regression_on_averaged_activations(name, tokens):
    width = "intermediate_size" if name == "mixtral" else "moe_intermediate_size"
    model, tokens = method_model(name, **{width: 4}), tokens[:8]
    seen = seen_by_layers(model, tokens)
    recipe = recipe_from_preset("m-smoe-pleas", allocation="uniform")
    compress_moe(model, recipe, calibration=load_calibration(tokens, held_out_fraction=0), progress=False)
    for of_layer, found in zip(seen, experts_now(model), strict=True):
        count, expected = of_layer.counts(), []
        for members in slow_m_smoe_groups(of_layer, cosines(of_layer.logits.T), NUM_EXPERTS[name] // 2):
            weights = of_layer.weights
            for expert in members[1:]:
                weights = in_order(weights, best_order(weights, members[0], expert), expert)
            shares = [count[e] / sum(count[m] for m in members) for e in members]
            expected.append(slow_merge(weights, members, shares, of_layer.inputs, 1e-2, "pleas"))
        gate, up, down = (torch.stack(one) for one in zip(*expected, strict=True))
        expected = ExpertWeights(gate=gate, up=up, down=down)
        assert_experts_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_recipes_keep_tokens_and_are_mapped():
    for name, needed in (("merge-moe", {"selection_count"}), ("m-smoe-pleas", {"selection_count", "logit_gram"})):
        recipe = recipe_from_preset(name)
        assert recipe.needs_inputs and recipe.layout == "mapped" and recipe.statistics_needed() == needed
    assert recipe_from_preset("merge-moe").alignment is None
    assert recipe_from_preset("m-smoe-pleas").alignment == "weight_matching"


def random_members(num=3, width=4, hidden=6, seed=0, bias=False):
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, num, width, hidden, generator=generator)
    biases = {}
    if bias:
        biases = {name: torch.randn(num, width, generator=generator) for name in ("gate_bias", "up_bias")}
        biases["down_bias"] = torch.randn(num, hidden, generator=generator)
    return ExpertWeights(gate=gate, up=up, down=torch.randn(num, hidden, width, generator=generator), **biases)


def tokens_of(states):
    empty = torch.zeros(len(states), 1)
    return LayerTokens(lambda up, gate: silu(gate) * up, torch.eye(1), [RoutedTokens(states, empty, states)], [])


def states(number, hidden=6, seed=5):
    return torch.randn(number, hidden, generator=torch.Generator().manual_seed(seed))


def output(weights, expert, x):
    t = {name: tensor[expert].double() for name, tensor in weights.tensors().items()}
    a = silu(x.double() @ t["gate"].T + t.get("gate_bias", 0)) * (x.double() @ t["up"].T + t.get("up_bias", 0))
    return a @ t["down"].T + t.get("down_bias", 0)


IMPORTANCE = torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("bias", [False, True])
def test_the_members_share_of_the_output_is_approached_better_than_by_the_mean(operator, bias):
    members, x = random_members(bias=bias), states(200)
    wanted = sum(w / 8 * output(members, e, x) for e, w in enumerate(IMPORTANCE.tolist()))
    fitted = operator(members, IMPORTANCE, tokens=tokens_of(x), ridge=1e-4)
    mean = weighted_mean(members, IMPORTANCE)
    for name in ("gate", "up", "gate_bias", "up_bias", "down_bias"):
        if name in mean.tensors():
            torch.testing.assert_close(fitted.tensors()[name], mean.tensors()[name])
    if operator is merge_by_least_squares_down:
        errors = [(output(one, 0, x) - wanted).square().sum().item() for one in (fitted, mean)]
        assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_a_huge_ridge_gives_the_weighted_mean(operator):
    members = random_members()
    mean, fitted = (
        weighted_mean(members, IMPORTANCE),
        operator(members, IMPORTANCE, tokens=tokens_of(states(50)), ridge=1e6),
    )
    torch.testing.assert_close(fitted.down, mean.down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ridge", [0, 1e-2])
@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_few_tokens_give_numbers_and_none_gives_the_mean(operator, number, ridge):
    members = random_members()
    fitted = operator(members, IMPORTANCE, tokens=tokens_of(states(number)), ridge=ridge)
    assert all(torch.isfinite(tensor).all() for tensor in fitted.tensors().values())
    if number == 0:
        assert torch.equal(fitted.down, weighted_mean(members, IMPORTANCE).down)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_an_unused_group_is_its_dominant_expert_and_so_are_copies_of_it(operator):
    members, x = random_members(), states(60)
    alone = operator(members, torch.zeros(3), tokens=tokens_of(x), ridge=1e-3)
    torch.testing.assert_close(output(alone, 0, x), output(members, 0, x), rtol=1e-4, atol=1e-4)
    copies = ExpertWeights(**{name: t[:1].expand(3, *t.shape[1:]) for name, t in members.tensors().items()})
    merged = operator(copies, IMPORTANCE, tokens=tokens_of(x), ridge=1e-3)
    torch.testing.assert_close(output(merged, 0, x), output(members, 0, x), rtol=1e-4, atol=1e-4)


def test_the_pseudo_inverse_worked_by_hand():
    # One feature is 0 on all tokens: its column of down is 0, not a division by 0.
    gram = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    cross = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    assert solve(gram, cross, 0).tolist() == [[0.5], [0.0]]
    # r = 0.5 times the mean energy 2: (4 + 1) w = 2.
    torch.testing.assert_close(solve(gram, cross, 0.5), torch.tensor([[0.4], [0.0]], dtype=torch.float64))
    assert solve(0 * gram, cross, 0.5).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_the_sums_take_the_memory_that_they_say_whatever_the_number_of_tokens(operator, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "hf_mcsmoe.solvers.down_fit.solve",
        lambda gram, cross, ridge: sizes.append((gram.shape, cross.shape, gram.dtype)) or solve(gram, cross, ridge),
    )
    for number in (3, 50):
        operator(random_members(width=5, hidden=6), IMPORTANCE, tokens=tokens_of(states(number)))
    assert sizes == [((5, 5), (5, 6), torch.float64)] * 2


@pytest.mark.parametrize("most, taken", [(4, [0, 2, 5, 7]), (9, range(10)[:9]), (10, range(10)), (99, range(10))])
def test_a_bounded_number_of_tokens_is_taken_at_even_distances(most, taken):
    x = torch.arange(10.0)[:, None].expand(10, 6)
    batches = [RoutedTokens(part, torch.zeros(len(part), 1), part) for part in x.split([3, 1, 6])]
    kept = LayerTokens(None, torch.eye(1), batches, [])
    found = torch.cat(list(hidden_states_of(kept, x.device, most)))[:, 0].tolist()
    assert found == list(taken)
    members = random_members()
    fitted = merge_by_least_squares_down(members, IMPORTANCE, tokens=tokens_of(states(50)), max_tokens=10)
    few = merge_by_least_squares_down(members, IMPORTANCE, tokens=tokens_of(states(50)[::5]))
    assert torch.equal(fitted.down, few.down)


def test_the_similarity_is_the_cosine_of_flattened_gate_and_up_in_any_number_of_pieces(monkeypatch):
    weights = random_members(5, 7)
    expected = cosines(torch.cat([weights.up.flatten(1), weights.gate.flatten(1)], dim=1).double())
    for most in (2**24, 60, 1):
        monkeypatch.setattr("hf_mcsmoe.similarity.inner_weights.MOST_NUMBERS", most)
        torch.testing.assert_close(inner_weight_similarity(None, weights), expected, rtol=1e-5, atol=1e-6)
    ungated = ExpertWeights(up=weights.up, down=weights.down)
    expected = cosines(weights.up.flatten(1).double())
    torch.testing.assert_close(inner_weight_similarity(None, ungated), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [-1e-3, float("nan"), "0.1", True])
def test_a_ridge_that_cannot_be_is_refused(value):
    for merging in ("least_squares_down", "pleas"):
        with pytest.raises(ValueError, match=r"ridge is .*, it must be in \[0, 1000000\]\. 0 is the pseudo-inverse"):
            Recipe(merging=merging, merging_options={"ridge": value})
        with pytest.raises(ValueError, match="max_tokens is 0, it must be a whole number >= 1"):
            Recipe(merging=merging, merging_options={"max_tokens": 0})
