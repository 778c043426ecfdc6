"""The neuron order is the best of all orders, and a planted one is found again."""

import itertools

import pytest
import torch

from hf_mcsmoe.alignment import ALIGNMENT
from hf_mcsmoe.alignment.weight_matching import align_by_weight_matching
from hf_mcsmoe.types import ExpertGroups, ExpertWeights

HIDDEN = 6
FORMATS = {
    "gated": ("gate", "up", "down"),
    "ungated": ("up", "down"),
    "gated-bias": ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"),
    "ungated-bias": ("up", "down", "up_bias", "down_bias"),
}
# Alignments that need nothing but the experts; the others have tests of their own.
ALIGNMENTS = [name for name in ALIGNMENT if not ALIGNMENT.asks_for(name)]
# Groups of 1, 2 and 3 members, one dropped expert, dominant experts that are not the first of their group.
GROUPS = ExpertGroups(
    group_of_expert=torch.tensor([2, 0, 1, -1, 2, 2, 1]),
    dominant_of_group=torch.tensor([1, 2, 5]),
)


def random_weights(names, width, num_experts=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (width, HIDDEN), "up": (width, HIDDEN), "down": (HIDDEN, width)}
    shapes |= {"gate_bias": (width,), "up_bias": (width,), "down_bias": (HIDDEN,)}
    return ExpertWeights(**{name: torch.randn(num_experts, *shapes[name], generator=generator) for name in names})


def random_order(width, num_experts=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(width, generator=generator) for _ in range(num_experts)])


def distance(weights, dominant, expert, order):
    """Sum of squared differences over all matrices and neuron biases, expert's neurons taken in `order`."""
    total = 0.0
    for name, tensor in weights.tensors().items():
        if name == "down_bias":
            continue
        moved = tensor[expert][:, order] if name == "down" else tensor[expert][order]
        total += (tensor[dominant].double() - moved.double()).square().sum().item()
    return total


def followers():
    for group in range(GROUPS.num_groups):
        dominant, *others = GROUPS.members(group).tolist()
        for expert in others:
            yield dominant, expert


@pytest.mark.parametrize("names", FORMATS.values(), ids=FORMATS.keys())
def test_a_planted_order_is_found_exactly(names):
    width = 17
    dominant_of_expert = torch.tensor([5, 1, 2, 3, 5, 5, 2])
    copies = {name: tensor[dominant_of_expert] for name, tensor in random_weights(names, width).tensors().items()}
    planted = random_order(width)
    order = align_by_weight_matching(ExpertWeights(**copies).permute_neurons(planted), GROUPS)
    for dominant, expert in followers():
        # Place a of expert e holds neuron planted[e, a]; aligned place a must hold neuron planted[dominant, a].
        assert planted[expert][order[expert]].tolist() == planted[dominant].tolist()
        assert planted[expert].tolist() != planted[dominant].tolist()


@pytest.mark.parametrize("names", FORMATS.values(), ids=FORMATS.keys())
def test_a_planted_order_is_found_under_noise_and_in_bfloat16(names):
    width = 17
    dominant_of_expert = torch.tensor([5, 1, 2, 3, 5, 5, 2])
    noise = random_weights(names, width, seed=2).tensors()
    weights = random_weights(names, width).tensors()
    copies = {name: (weights[name][dominant_of_expert] + 0.1 * noise[name]).bfloat16() for name in names}
    planted = random_order(width)
    order = align_by_weight_matching(ExpertWeights(**copies).permute_neurons(planted), GROUPS)
    for dominant, expert in followers():
        assert planted[expert][order[expert]].tolist() == planted[dominant].tolist()


@pytest.mark.parametrize("name", ["gate", "up", "down", "gate_bias", "up_bias"])
def test_every_matrix_and_neuron_bias_has_a_say_in_the_order(name):
    # All neurons of the two experts are equal but for one matrix, which a planted order shuffles.
    distinct = random_weights(FORMATS["gated-bias"], 5, num_experts=2).tensors()
    tensors = {key: torch.ones_like(value) for key, value in distinct.items()} | {name: distinct[name][[0, 0]]}
    planted = torch.tensor([[0, 1, 2, 3, 4], [3, 1, 4, 0, 2]])
    weights = ExpertWeights(**tensors).permute_neurons(planted)
    order = align_by_weight_matching(weights, ExpertGroups(torch.tensor([0, 0]), torch.tensor([0])))
    assert planted[1][order[1]].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("names", FORMATS.values(), ids=FORMATS.keys())
def test_the_order_is_the_best_of_all_permutations(names, width):
    weights = random_weights(names, width, seed=width)
    order = align_by_weight_matching(weights, GROUPS)
    for dominant, expert in followers():
        possible = (distance(weights, dominant, expert, list(p)) for p in itertools.permutations(range(width)))
        assert distance(weights, dominant, expert, order[expert]) == pytest.approx(min(possible), rel=1e-6)


@pytest.mark.parametrize("name", ALIGNMENTS)
@pytest.mark.parametrize("names", FORMATS.values(), ids=FORMATS.keys())
def test_aligned_experts_are_never_farther_apart_than_before(name, names):
    for seed in range(5):
        weights = random_weights(names, 24, seed=seed)
        order = ALIGNMENT[name](weights, GROUPS)
        for dominant, expert in followers():
            before = distance(weights, dominant, expert, torch.arange(24))
            assert distance(weights, dominant, expert, order[expert]) <= before * (1 + 1e-6)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_every_order_is_a_permutation_and_leaves_leaders_loners_and_dropped_experts_alone(name):
    order = ALIGNMENT[name](random_weights(FORMATS["gated"], 9), GROUPS)
    assert order.shape == (7, 9) and order.dtype == torch.int64
    identity = torch.arange(9)
    assert all(torch.equal(row.sort().values, identity) for row in order)
    for expert in (1, 2, 5, 3):  # 1 leads nobody else, 2 and 5 lead, 3 is dropped
        assert torch.equal(order[expert], identity)
    assert all(not torch.equal(order[expert], identity) for _, expert in followers())


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_experts_that_are_aligned_already_stay_as_they_are(name):
    weights = random_weights(FORMATS["gated"], 12, num_experts=1)
    same = ExpertWeights(**{key: value.expand(7, -1, -1) for key, value in weights.tensors().items()})
    assert torch.equal(ALIGNMENT[name](same, GROUPS), torch.arange(12).repeat(7, 1))


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_the_same_weights_always_give_the_same_order_also_where_neurons_tie(name):
    weights = random_weights(FORMATS["gated"], 8)
    for tensor in (weights.gate, weights.up):
        tensor[:, 4:] = tensor[:, :4]
    weights.down[:, :, 4:] = weights.down[:, :, :4]
    assert torch.equal(ALIGNMENT[name](weights, GROUPS), ALIGNMENT[name](weights, GROUPS))


def test_members_are_matched_to_their_own_dominant_expert_and_not_to_expert_0():
    weights = random_weights(FORMATS["gated"], 10)
    order = align_by_weight_matching(weights, GROUPS)
    changed = ExpertWeights(**{key: value.clone() for key, value in weights.tensors().items()})
    for tensor in changed.tensors().values():
        tensor[0] = torch.randn(tensor[0].shape, generator=torch.Generator().manual_seed(9))
    assert torch.equal(align_by_weight_matching(changed, GROUPS)[1:], order[1:])
