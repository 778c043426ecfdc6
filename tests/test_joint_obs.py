"""Selection by the Optimal Brain Surgeon on all experts of a layer, against ridge problems solved by brute force."""

import itertools

import pytest
import torch
from fit_layers import FORMATS, activation, packed_experts, routed, slow_features, with_targets_of
from test_layer_fit import fit, reports

from hf_mcsmoe.layer import fit as layer_fit
from hf_mcsmoe.layer.fit import LEAST_SHARE, choose_neurons, grams_of, least_width
from hf_mcsmoe.observation.gated_features import sum_features
from hf_mcsmoe.observation.kept_features import KeptFeatures
from hf_mcsmoe.observation.token_batches import RoutedTokens
from hf_mcsmoe.refit.least_squares import mean_energies
from hf_mcsmoe.selection.gated_obs import saliency_by_gated_obs
from hf_mcsmoe.selection.joint_obs import is_above, order_by_joint_obs

WIDTHS = (4, 0, 3, 5)
RIDGE = 1e-2


@pytest.fixture(scope="module")
def tokens():
    """Targets that the experts alone do not give."""
    return with_targets_of(packed_experts(widths=WIDTHS, seed=7), routed(60, len(WIDTHS)), noise=0.5)


def order_of(experts, tokens, budget, **options):
    supply = {
        "grams": grams_of(KeptFeatures(experts, activation, [tokens])),
        "sums": sum_features(experts, activation, [tokens]),
    }
    return order_by_joint_obs(experts, **supply, budget=budget, **{"ridge": RIDGE, **options})


def slow_minimum(experts, tokens, kept, ridge=RIDGE):
    """min over W, zero outside `kept`, of |y - phi W|^2 + sum_e r_e |W_e - down_e|^2, as one dense problem."""
    phi, down = slow_features(experts, tokens), experts.down.double()
    wanted = tokens.targets.double()
    if experts.down_bias is not None:
        wanted = wanted - tokens.gates.double() @ experts.down_bias.double()
    damping = ridge * mean_energies(phi.T @ phi, experts.offsets.tolist())
    rows = torch.cat([phi, damping.sqrt().diag()])
    values = torch.cat([wanted, damping.sqrt()[:, None] * down])
    if not kept:
        return values.square().sum().item()
    solution = torch.linalg.lstsq(rows[:, kept], values).solution
    return (values - rows[:, kept] @ solution).square().sum().item()


def slow_order(experts, tokens, num_kept, least):
    """One at a time, the neuron whose loss leaves the least minimum, of the experts that may lose one."""
    expert_of, left, order = experts.expert_of_neuron.tolist(), list(range(experts.num_neurons)), []
    while len(left) > num_kept:
        widths = [sum(expert_of[b] == e for b in left) for e in range(experts.num_experts)]
        free = [a for a in left if widths[expert_of[a]] > least]
        gone = min(free, key=lambda a: slow_minimum(experts, tokens, [b for b in left if b != a]))
        order.append(gone)
        left.remove(gone)
    return order, left


BUDGETS = [(4, 0), (5, 1), (6, 2), (9, 3)]


@pytest.mark.parametrize(("budget", "form"), list(zip(BUDGETS, FORMATS, strict=True)))
def test_the_order_is_that_of_the_slow_greedy_elimination(budget, form, tokens):
    experts = packed_experts(FORMATS[form], WIDTHS)
    place = order_of(experts, tokens, budget, block=1e-9)
    order, left = slow_order(experts, tokens, *budget)
    assert place.argsort().tolist()[: len(order)] == order
    assert sorted(place.argsort().tolist()[len(order) :]) == left
    assert sorted(place.tolist()) == list(range(experts.num_neurons))


def test_other_experts_and_the_targets_count(tokens):
    """On these tokens neither the experts alone nor other targets give the same neurons."""
    experts = packed_experts(widths=WIDTHS)
    kept = order_of(experts, tokens, (6, 0)).argsort()[-6:].sort().values
    alone = (
        saliency_by_gated_obs(experts, grams=grams_of(KeptFeatures(experts, activation, [tokens])))
        .argsort()[-6:]
        .sort()
        .values
    )
    others = RoutedTokens(tokens.hidden_states, tokens.gates, tokens.targets.flip(0))
    assert not torch.equal(kept, alone)
    assert not torch.equal(kept, order_of(experts, others, (6, 0)).argsort()[-6:].sort().values)
    assert slow_minimum(experts, tokens, kept.tolist()) < slow_minimum(experts, tokens, alone.tolist())


def test_a_neuron_that_is_there_twice_goes_first():
    """A twin in another expert that sees the same tokens makes up for it at no cost, which one expert cannot see."""
    experts = packed_experts(widths=(4, 4), seed=3)
    for name, tensor in experts.tensors().items():
        if name not in ("down", "down_bias"):
            tensor[4] = tensor[0]
    tokens = routed(50, 2, top_k=2)
    tokens = with_targets_of(experts, RoutedTokens(tokens.hidden_states, torch.full((50, 2), 0.5), tokens.targets))
    first = int(order_of(experts, tokens, (7, 0), ridge=1e-6).argmin())
    assert first in (0, 4)
    costs = [slow_minimum(experts, tokens, [b for b in range(8) if b != a], 1e-6) for a in range(8)]
    assert max(costs[0], costs[4]) < 1e-3 * min(costs[a] for a in (1, 2, 3, 5, 6, 7))


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("block", [0.05, 0.5, 1.0])
def test_what_stays_keeps_to_the_budget(block, is_uniform, tokens):
    experts = packed_experts(widths=(6, 6, 6, 6), seed=2)
    budget = 3 if is_uniform else 17
    num_kept, least = (12 if is_uniform else 17), least_width(budget, 4, is_uniform)
    place = order_of(experts, tokens, (num_kept, least), block=block)
    kept = choose_neurons(place, experts.offsets.tolist(), budget, is_uniform)
    assert kept.tolist() == place.argsort()[-num_kept:].sort().values.tolist()
    widths = experts.expert_of_neuron[kept].bincount(minlength=4)
    assert (widths == 3).all() if is_uniform else (widths >= least).all()
    assert least == (3 if is_uniform else int(LEAST_SHARE * 17 / 4))


def test_is_above_keeps_the_last_ones_of_each():
    assert is_above(torch.tensor([0, 1, 0, 0, 1, 2]), 1).tolist() == [True, True, True, False, False, False]
    assert is_above(torch.tensor([0, 1, 0, 0, 1, 2]), 2).tolist() == [True, False, False, False, False, False]
    assert is_above(torch.tensor([0, 2]), 0).all()


def test_experts_without_tokens_keep_their_own_order_and_no_token_at_all_is_no_reason_to_fail(tokens):
    experts = packed_experts(widths=(5, 5, 5), seed=4)
    gates = tokens.gates[:, :3].clone()
    gates[:, 1] = 0
    seen = RoutedTokens(tokens.hidden_states, gates, tokens.targets)
    place = order_of(experts, seen, (6, 2))
    grams = grams_of(KeptFeatures(experts, activation, [seen]))
    assert torch.isfinite(place).all() and sorted(place.tolist()) == list(range(15))
    alone = saliency_by_gated_obs(experts, grams=grams, ridge=RIDGE)[5:10]
    assert place[5:10].argsort()[-2:].sort().values.tolist() == alone.argsort()[-2:].sort().values.tolist()
    nobody = RoutedTokens(tokens.hidden_states, torch.zeros_like(gates), tokens.targets)
    assert torch.isfinite(order_of(experts, nobody, (6, 2))).all()


def test_where_the_joint_gram_is_too_large_experts_are_taken_alone(original, monkeypatch):
    rows = torch.randint(3, 150, (24, 20), generator=torch.Generator().manual_seed(0))
    how = {"keep": 0.4, "refit": "least_squares"}
    joint, alone = (fit(original("mixtral"), rows, selection=name, **how) for name in ("joint_obs", "gated_obs"))
    monkeypatch.setattr(layer_fit, "MOST_JOINT_NEURONS", 100)
    limited = fit(original("mixtral"), rows, selection="joint_obs", **how)
    widths = [[layer.widths for layer in reports(model)] for model in (joint, alone, limited)]
    assert widths[2] == widths[1] != widths[0]
    pairs = itertools.pairwise(sum(w) for layers in widths for w in layers)
    assert all(a == b for a, b in pairs)
