"""Saliency of single neurons, against ridge problems solved by brute force."""

import dataclasses

import numpy as np
import pytest
import torch
from fit_layers import FORMATS, activation, packed_experts, routed, slow_features

from hf_mcsmoe.expert_values import PackedExperts
from hf_mcsmoe.layer import unreached
from hf_mcsmoe.layer.fit import choose_neurons
from hf_mcsmoe.layer.unreached import with_unreached
from hf_mcsmoe.observation.gated_features import sum_expert_grams
from hf_mcsmoe.observation.token_batches import RoutedTokens
from hf_mcsmoe.selection import SELECTION, gated_obs
from hf_mcsmoe.selection.gated_obs import increasing, removal_costs, saliency_by_gated_obs

WIDTHS = (4, 0, 6, 5)
RIDGE = 3e-3
RULES = [name for name in SELECTION if SELECTION.asks_for(name) == {"grams"}]


def grams_of(experts, batch):
    phi, offsets = slow_features(experts, batch), experts.offsets.tolist()
    blocks = [phi[:, offsets[e] : offsets[e + 1]] for e in range(experts.num_experts)]
    return [block.T @ block for block in blocks]


@pytest.fixture(scope="module")
def tokens():
    return routed(40, len(WIDTHS))


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def experts(request):
    return packed_experts(request.param, WIDTHS)


def ridge_minimum(gram, down, damping, kept):
    """min over rows V of `kept` of tr (down - V)^T (gram + damping) (down - V), by least squares.

    That is |phi down - phi V|^2 + damping |down - V|^2: stacked rows of phi and sqrt(damping) I.
    """
    values, vectors = torch.linalg.eigh(gram)
    phi = (vectors * values.clamp(min=0).sqrt()).T
    rows = torch.cat([phi, damping**0.5 * torch.eye(len(gram), dtype=gram.dtype)])
    target = rows @ down
    if not kept:
        return target.square().sum().item()
    solution = np.linalg.lstsq(rows[:, kept].numpy(), target.numpy(), rcond=None)[0]
    return (target - rows[:, kept] @ torch.from_numpy(solution)).square().sum().item()


def damping_of(gram, ridge=RIDGE):
    return ridge * gram.diagonal().mean().item()


def slow_greedy(gram, down, damping):
    """One neuron at a time, always the one whose loss leaves the least ridge minimum: (order, minima)."""
    left, order, minima = list(range(len(down))), [], []
    while left:
        trials = [(ridge_minimum(gram, down, damping, [b for b in left if b != a]), a) for a in left]
        least, gone = min(trials)
        order.append(gone)
        minima.append(least)
        left.remove(gone)
    return order, minima


def of_expert(experts, saliency, expert):
    return saliency[experts.offsets[expert] : experts.offsets[expert + 1]]


# --- the cost of a removal


def test_costs_are_those_of_the_slow_greedy_elimination(experts, tokens):
    grams = grams_of(experts, tokens)
    saliency = saliency_by_gated_obs(experts, grams=grams, ridge=RIDGE, block=1e-9)
    for expert, gram in enumerate(grams):
        if not len(gram):
            continue
        down = experts.down[experts.offsets[expert] : experts.offsets[expert + 1]].double()
        order, minima = slow_greedy(gram, down, damping_of(gram))
        costs = torch.tensor(minima, dtype=torch.float64).diff(prepend=torch.zeros(1, dtype=torch.float64))
        got = of_expert(experts, saliency, expert)
        torch.testing.assert_close(got[order], costs.cummax(0).values, rtol=2e-5, atol=1e-9)
        assert got.argsort(stable=True).tolist() == order


def test_the_cheapest_neuron_costs_what_refitting_the_others_cannot_make_up_for(experts, tokens):
    grams = grams_of(experts, tokens)
    saliency = saliency_by_gated_obs(experts, grams=grams, ridge=RIDGE)
    for expert in (0, 2, 3):
        gram = grams[expert]
        down = experts.down[experts.offsets[expert] : experts.offsets[expert + 1]].double()
        others = [[b for b in range(len(down)) if b != a] for a in range(len(down))]
        alone = [ridge_minimum(gram, down, damping_of(gram), kept) for kept in others]
        got = of_expert(experts, saliency, expert)
        assert got.min().item() == pytest.approx(min(alone), rel=1e-6)
        assert int(got.argmin()) == alone.index(min(alone))


@pytest.mark.parametrize("block", [0.3, 0.5, 1.0])
def test_costs_of_blocks_add_up_to_the_minimum_without_any_of_them(block):
    experts = packed_experts(widths=(12,), seed=3)
    (gram,) = grams_of(experts, routed(30, 1, top_k=1))
    down, damping = experts.down.double(), damping_of(gram)
    hessian = gram + damping * torch.eye(12, dtype=torch.float64)
    (costs,) = removal_costs(hessian.inverse()[None], down[None], block)
    order = costs.argsort(stable=True).tolist()
    # Costs are made non-decreasing, so sums of nested sets are at least the minima; all of them together are no less.
    for number in (1, 4, 9, 12):
        least = ridge_minimum(gram, down, damping, order[number:])
        assert costs[order[:number]].sum().item() >= least * (1 - 1e-9)
    assert costs.sum().item() >= ridge_minimum(gram, down, damping, []) * (1 - 1e-9)
    assert costs.min() > 0


def test_smaller_blocks_leave_no_worse_neurons():
    experts = packed_experts(widths=(24,), seed=5)
    (gram,) = grams_of(experts, routed(60, 1, top_k=1))
    kept = {}
    for block in (1e-9, 1.0):
        saliency = saliency_by_gated_obs(experts, grams=[gram], block=block)
        left = saliency.argsort(descending=True)[:8].tolist()
        kept[block] = ridge_minimum(gram, experts.down.double(), damping_of(gram), left)
    assert kept[1e-9] < kept[1.0]


def test_energy_is_what_a_neuron_adds_alone(experts, tokens):
    saliency = SELECTION["gated_energy"](experts, grams=grams_of(experts, tokens))
    phi = slow_features(experts, tokens)
    for neuron in range(experts.num_neurons):
        added = phi[:, neuron, None] * experts.down[neuron].double()
        assert saliency[neuron].item() == pytest.approx(added.square().sum().item(), rel=1e-6)


# --- what is known beforehand


@pytest.mark.parametrize("name", RULES)
def test_a_dead_neuron_costs_nothing(name, tokens):
    experts = packed_experts(widths=WIDTHS)
    experts.up[6] = 0  # of expert 2: it answers 0 to everything
    experts.down[11] = 0  # of expert 3: nothing comes of its answer
    saliency = SELECTION[name](experts, grams=grams_of(experts, tokens))
    assert saliency[11] == 0
    alive = torch.tensor([n for n in range(experts.num_neurons) if n not in (6, 11)])
    assert saliency[6] < 0.05 * saliency[alive].median()


def test_one_of_two_equal_neurons_costs_nothing_but_both_do(tokens):
    experts = packed_experts(widths=WIDTHS, seed=2)
    for tensor in (experts.up, experts.gate):
        tensor[9] = tensor[5]  # of expert 2
    saliency = saliency_by_gated_obs(experts, grams=grams_of(experts, tokens), ridge=1e-6, block=1e-9)
    pair, others = saliency[[5, 9]], saliency[[4, 6, 7, 8]]
    assert pair.min() < 1e-3 * others.min()
    assert pair.max() > 1e-2 * others.max()
    energy = SELECTION["gated_energy"](experts, grams=grams_of(experts, tokens))
    assert energy[[5, 9]].min() > 1e-2 * energy[[4, 6, 7, 8]].max()  # the energy does not see it


@pytest.mark.parametrize("name", RULES)
def test_scaling_a_neuron_and_its_column_back_changes_little(name, tokens):
    experts = packed_experts(widths=WIDTHS, seed=1)
    options = {"ridge": 1e-9} if name == "gated_obs" else {}
    before = SELECTION[name](experts, grams=grams_of(experts, tokens), **options)
    scale = torch.full((experts.num_neurons, 1), 1.0)
    scale[[1, 7, 12], 0] = torch.tensor([3.0, 0.2, 5.0])
    scaled = dataclasses.replace(experts, up=experts.up * scale, down=experts.down / scale)
    after = SELECTION[name](scaled, grams=grams_of(scaled, tokens), **options)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_relabelling_experts_commutes(name, tokens):
    experts = packed_experts(widths=WIDTHS)
    order = [2, 3, 0, 1]  # new expert j was this one
    offsets = experts.offsets.tolist()
    index = torch.cat([torch.arange(offsets[e], offsets[e + 1]) for e in order])
    widths = [0, *(WIDTHS[e] for e in order)]
    fields = {field: tensor[index] for field, tensor in experts.tensors().items()}
    relabelled = PackedExperts(offsets=torch.tensor(widths).cumsum(0), **fields)
    moved = RoutedTokens(tokens.hidden_states, tokens.gates[:, order], tokens.targets)
    saliency = SELECTION[name](experts, grams=grams_of(experts, tokens))
    torch.testing.assert_close(SELECTION[name](relabelled, grams=grams_of(relabelled, moved)), saliency[index])


@pytest.mark.parametrize("name", RULES)
def test_permuting_neurons_commutes(name, tokens):
    experts = packed_experts(widths=WIDTHS)
    generator, offsets = torch.Generator().manual_seed(4), experts.offsets.tolist()
    index = torch.cat([offsets[e] + torch.randperm(WIDTHS[e], generator=generator) for e in range(len(WIDTHS))])
    permuted = dataclasses.replace(experts, **{n: t[index] for n, t in experts.tensors().items()})
    saliency = SELECTION[name](experts, grams=grams_of(experts, tokens))
    torch.testing.assert_close(SELECTION[name](permuted, grams=grams_of(permuted, tokens)), saliency[index])


@pytest.mark.parametrize("name", RULES)
def test_saliency_grows_with_the_gates(name, tokens):
    experts = packed_experts(widths=WIDTHS)
    doubled = RoutedTokens(tokens.hidden_states, tokens.gates * torch.tensor([1.0, 1.0, 2.0, 1.0]), tokens.targets)
    before, after = (SELECTION[name](experts, grams=grams_of(experts, batch)) for batch in (tokens, doubled))
    torch.testing.assert_close(of_expert(experts, after, 2), 4 * of_expert(experts, before, 2))
    torch.testing.assert_close(of_expert(experts, after, 0), of_expert(experts, before, 0))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_few_tokens_give_finite_saliency(name, num_tokens):
    experts = packed_experts(widths=WIDTHS)
    batch = routed(num_tokens, len(WIDTHS))
    saliency = SELECTION[name](experts, grams=sum_expert_grams(experts, activation, [batch]))
    assert saliency.shape == (experts.num_neurons,) and saliency.dtype == torch.float64
    assert saliency.isfinite().all() and (saliency >= 0).all()


def test_a_ridge_below_the_precision_of_the_gram_is_raised():
    experts = packed_experts(widths=(12,))
    for tensor in (experts.up, experts.gate):
        tensor[6:] = tensor[:6]
    (gram,) = sum_expert_grams(experts, activation, [routed(40, 1, top_k=1)])
    noise = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = gram + 1e-6 * gram.diagonal().mean() * (noise + noise.T)  # not positive any more
    assert torch.linalg.eigvalsh(noisy)[0] < 0
    saliency = saliency_by_gated_obs(experts, grams=[noisy], ridge=1e-12)
    assert saliency.isfinite().all() and (saliency > 0).all()


# --- experts that calibration never reached


def unreached_case():
    """Tokens of which none goes to expert 2, and its features if all of them went there with the usual gate."""
    experts, batches = packed_experts(FORMATS["gated-bias"], WIDTHS), [routed(9, 4, seed=1), routed(14, 4, seed=2)]
    for batch in batches:
        batch.gates[:, 2] = 0
    gates = torch.cat([batch.gates for batch in batches])
    gate = gates[gates != 0].double().square().mean().sqrt().item()
    states = torch.cat([batch.hidden_states for batch in batches])
    everywhere = RoutedTokens(states, torch.full((23, 4), gate), states)
    return experts, batches, slow_features(experts, everywhere)[:, 4:10]


def test_an_unreached_expert_counts_as_if_one_average_token_had_reached_it():
    experts, batches, features = unreached_case()
    grams = sum_expert_grams(experts, activation, batches)
    completed = with_unreached(grams, experts, activation, batches)
    torch.testing.assert_close(completed[2], features.T @ features / 23, rtol=1e-5, atol=1e-6)
    assert not grams[2].any()
    assert all(torch.equal(completed[e], grams[e]) for e in (0, 1, 3))


def test_a_sample_of_the_tokens_stands_for_all(monkeypatch):
    experts, batches, features = unreached_case()
    monkeypatch.setattr(unreached, "CHUNK_TOKENS", 9)
    completed = with_unreached(sum_expert_grams(experts, activation, batches), experts, activation, batches)
    torch.testing.assert_close(completed[2], features[:9].T @ features[:9] / 9, rtol=1e-5, atol=1e-6)


def test_without_tokens_nothing_is_known_of_unreached_experts():
    experts = packed_experts(widths=WIDTHS)
    silent = routed(5, 4)
    for batches in ([], [RoutedTokens(silent.hidden_states, silent.gates * 0, silent.targets)]):
        grams = sum_expert_grams(experts, activation, batches)
        assert with_unreached(grams, experts, activation, batches) is grams


@pytest.mark.parametrize("name", RULES)
def test_neurons_of_an_unreached_expert_rank_by_what_they_would_do(name):
    experts, batches, _ = unreached_case()
    experts.up[5], experts.up_bias[5] = 0.0, 0.0  # does nothing, whatever reaches it
    grams = with_unreached(sum_expert_grams(experts, activation, batches), experts, activation, batches)
    saliency = SELECTION[name](experts, grams=grams)
    alive = torch.tensor([4, 6, 7, 8, 9])
    assert (saliency[alive] > 0).all() and saliency[5] < saliency[alive].min()
    assert saliency[alive].sum() < saliency[:4].sum()


# --- from saliency to neurons


def test_every_expert_keeps_an_eighth_of_an_equal_share():
    saliency = torch.cat([torch.arange(64.0) + 100, torch.zeros(32), torch.tensor([5.0, 7.0])])
    offsets = [0, 64, 96, 98]
    kept = choose_neurons(saliency, offsets, 48, False)  # an eighth of an equal share are 2
    assert kept.numel() == 48 and kept.unique().numel() == 48
    assert kept.tolist() == [*range(20, 64), 64, 65, 96, 97]
    assert choose_neurons(saliency, offsets, 23, False).tolist() == list(range(41, 64))
    assert choose_neurons(saliency, offsets, 98, False).tolist() == list(range(98))


def test_the_most_salient_neurons_stay_and_ties_go_to_the_lower_one():
    saliency = torch.tensor([3.0, 1.0, 2.0, 2.0, 9.0, 2.0, 0.5, 4.0, 0.1])
    offsets = [0, 4, 4, 9]
    assert choose_neurons(saliency, offsets, 4, False).tolist() == [0, 2, 4, 7]
    assert choose_neurons(saliency, offsets, 5, False).tolist() == [0, 2, 3, 4, 7]
    assert choose_neurons(saliency, offsets, 9, False).tolist() == list(range(9))
    assert choose_neurons(saliency, [0, 4, 9], 2, True).tolist() == [0, 2, 4, 7]
    assert choose_neurons(torch.ones(6), [0, 3, 6], 2, True).tolist() == [0, 1, 3, 4]
    assert choose_neurons(torch.ones(6), [0, 3, 6], 4, False).tolist() == [0, 1, 2, 3]


def test_a_neuron_that_goes_later_is_more_salient_whatever_its_place():
    costs = torch.tensor([0.1, 0.2532085769405283, 0.2, 0.15, 0.3, 0.3, 0.25], dtype=torch.float64)
    found = increasing(costs)
    assert (found.diff() > 0).all()
    torch.testing.assert_close(found, costs.cummax(0).values, rtol=1e-15, atol=0)


def test_experts_that_are_eliminated_together_get_what_each_gets_alone(monkeypatch):
    widths = (5, 3, 0, 5, 5, 3)
    experts, batch = packed_experts(FORMATS["gated-bias"], widths), routed(50, len(widths))
    grams = sum_expert_grams(experts, activation, [batch])
    grams[3] = grams[3] - 3 * RIDGE * torch.eye(5) * max(g.diagonal().sum() for g in grams)  # takes a larger ridge
    together = saliency_by_gated_obs(experts, grams=grams)
    monkeypatch.setattr(gated_obs, "MOST_NUMBERS", 2 * 5 * (5 + experts.down.shape[1]))
    assert list(gated_obs.alike(experts)) == [[0, 3], [4], [1, 5]]
    torch.testing.assert_close(saliency_by_gated_obs(experts, grams=grams), together)
    monkeypatch.setattr(gated_obs, "MOST_NUMBERS", 1)
    assert [len(members) for members in gated_obs.alike(experts)] == [1] * 5
    torch.testing.assert_close(saliency_by_gated_obs(experts, grams=grams), together)


def test_a_small_ridge_or_a_failure_in_float32_is_eliminated_in_float64(monkeypatch, tokens):
    experts = packed_experts(widths=WIDTHS)
    grams, dtypes = grams_of(experts, tokens), []
    slow = gated_obs.removal_costs

    def watched(inverses, down, block):
        dtypes.append(inverses.dtype)
        if inverses.dtype == torch.float32 and fails:
            raise torch.linalg.LinAlgError
        return slow(inverses, down, block)

    monkeypatch.setattr(gated_obs, "removal_costs", watched)
    found = {}
    for fails, ridge in ((False, 3e-3), (True, 3e-3), (False, 9e-4)):
        found[fails, ridge] = saliency_by_gated_obs(experts, grams=grams, ridge=ridge)
    each = len(dtypes) // 4
    assert dtypes == [torch.float32] * each + [torch.float32, torch.float64] * each + [torch.float64] * each
    torch.testing.assert_close(found[True, 3e-3], found[False, 3e-3], rtol=1e-4, atol=0)
    assert (found[True, 3e-3] != found[False, 3e-3]).any()
