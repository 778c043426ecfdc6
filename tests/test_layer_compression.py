"""One layer on bare tensors: group, align, merge; against the paper's formula written out slowly."""

import itertools

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from torch.nn.functional import relu, silu

from hf_mcsmoe.families import find_layers
from hf_mcsmoe.grouping.dominant_experts import group_around_dominant_experts
from hf_mcsmoe.layer.duplicates import WORTH_COLLAPSING, duplicate_share, worth_collapsing
from hf_mcsmoe.layer.merging import group_experts, merge_groups
from hf_mcsmoe.merging import MERGING
from hf_mcsmoe.observation.layer_inputs import LayerInputs, relative_error, routed_output
from hf_mcsmoe.recipe import Recipe
from hf_mcsmoe.similarity.router_logits import router_logit_similarity
from hf_mcsmoe.types import ExpertFormat, ExpertGroups, ExpertWeights, LayerStatistics, MoeLayer

NUM_EXPERTS, HIDDEN, WIDTH = 10, 6, 4
FORMATS = {
    "gated": ("gate", "up", "down"),
    "ungated": ("up", "down"),
    "gated-bias": ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"),
    "ungated-bias": ("up", "down", "up_bias", "down_bias"),
}
# Operators that need nothing but the experts and keep their width; the others have tests of their own.
OPERATORS = [n for n in MERGING if not MERGING.asks_for(n) and not MERGING.trait(n, "unites")]
# Group 0 is expert 1 alone, group 1 has three members of which expert 4 was never used, no member of group 2 was
# used, group 3 is a pair; experts 3 and 7 are dropped.
GROUPS = ExpertGroups(torch.tensor([1, 0, 2, -1, 1, 1, 2, -1, 3, 3]), torch.tensor([1, 5, 6, 9]))
IMPORTANCE = torch.tensor([0.2, 0.1, 0.0, 0.15, 0.0, 0.4, 0.0, 0.05, 0.03, 0.07], dtype=torch.float64)


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def weights(request):
    return random_weights(request.param)


def random_weights(names, num_experts=NUM_EXPERTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    shapes |= {"gate_bias": (WIDTH,), "up_bias": (WIDTH,), "down_bias": (HIDDEN,)}
    return ExpertWeights(**{name: torch.randn(num_experts, *shapes[name], generator=generator) for name in names})


def mapped(function, weights):
    return ExpertWeights(**{name: function(tensor) for name, tensor in weights.tensors().items()})


def merged(weights, groups=GROUPS, importance=IMPORTANCE, **recipe):
    """The M experts that `merge_groups` writes; NaN wherever it wrote nothing."""
    into = mapped(
        lambda tensor: torch.full((groups.num_groups, *tensor.shape[1:]), torch.nan, dtype=tensor.dtype), weights
    )
    merge_groups(weights, groups, Recipe(**recipe), importance, into)
    return into


def reorder(name, matrix, order):
    if name == "down_bias":
        return matrix
    return matrix[:, order] if name == "down" else matrix[order]


def best_order(weights, dominant, expert):
    """The neuron order of least squared distance to the dominant expert, by trying all of them."""
    names = [name for name in weights.tensors() if name != "down_bias"]

    def distance(order):
        pairs = [(t[dominant], reorder(n, t[expert], list(order))) for n, t in weights.tensors().items() if n in names]
        return sum((left.double() - right.double()).square().sum().item() for left, right in pairs)

    return list(min(itertools.permutations(range(WIDTH)), key=distance))


def slow_merge(weights, groups, importance, align=True):
    """Li et al., 2024: W_m = sum of f_i W_i / sum of f_i over the members, aligned; the dominant if no f_i > 0."""
    experts = {name: [] for name in weights.tensors()}
    for group, dominant in enumerate(groups.dominant_of_group.tolist()):
        members = [e for e, label in enumerate(groups.group_of_expert.tolist()) if label == group]
        total = sum(importance[e].item() for e in members)
        order = {e: best_order(weights, dominant, e) if align else list(range(WIDTH)) for e in members}
        for name, tensor in weights.tensors().items():
            merged_tensor = torch.zeros(tensor.shape[1:], dtype=torch.float64)
            for e in members if total > 0 else [dominant]:
                share = importance[e].item() / total if total > 0 else 1.0
                merged_tensor += share * reorder(name, tensor[e].double(), order[e])
            experts[name].append(merged_tensor)
    return ExpertWeights(**{name: torch.stack(stack) for name, stack in experts.items()})


def expert_output(weights, expert, x):
    tensors = {name: tensor[expert].double() for name, tensor in weights.tensors().items()}
    neurons = tensors["up"] @ x + tensors.get("up_bias", 0)
    neurons = silu(tensors["gate"] @ x + tensors.get("gate_bias", 0)) * neurons if "gate" in tensors else relu(neurons)
    return tensors["down"] @ neurons + tensors.get("down_bias", 0)


def outputs(weights, expert):
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64)
    return torch.stack([expert_output(weights, expert, x) for x in inputs])


def assert_close(left, right, **tolerance):
    for name, tensor in right.tensors().items():
        torch.testing.assert_close(left.tensors()[name], tensor, check_dtype=False, **tolerance)


def random_orders(num_experts=NUM_EXPERTS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(WIDTH, generator=generator) for _ in range(num_experts)])


# --- merging


def test_groups_of_one_two_and_three_merge_as_in_the_paper(weights):
    assert_close(merged(weights), slow_merge(weights, GROUPS, IMPORTANCE))


def test_without_alignment_neurons_are_averaged_where_they_stand(weights):
    plain = slow_merge(weights, GROUPS, IMPORTANCE, align=False)
    assert_close(merged(weights, alignment=None), plain)
    assert (plain.up - slow_merge(weights, GROUPS, IMPORTANCE).up).abs().max() > 0.1


def test_the_average_counts_all_members_alike(weights):
    assert_close(merged(weights, merging="average"), slow_merge(weights, GROUPS, torch.ones(NUM_EXPERTS)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_give_the_float32_result_rounded_once(weights, dtype):
    narrow = mapped(lambda tensor: tensor.to(dtype), weights)
    exact = merged(mapped(torch.Tensor.float, narrow))
    for name, tensor in merged(narrow).tensors().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact.tensors()[name].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_alone_in_its_group_stays_bit_identical(weights, dtype):
    narrow = mapped(lambda tensor: tensor.to(dtype), weights)
    for name, tensor in merged(narrow).tensors().items():
        assert torch.equal(tensor[0], narrow.tensors()[name][1])


@pytest.mark.parametrize("name", OPERATORS)
def test_keeping_all_experts_is_bit_identical_with_every_operator(weights, name):
    everyone = torch.arange(NUM_EXPERTS)
    result = merged(weights, ExpertGroups(everyone, everyone), merging=name)
    assert all(torch.equal(tensor, weights.tensors()[key]) for key, tensor in result.tensors().items())


def test_pruning_keeps_the_dominant_experts_bit_by_bit(weights):
    result = merged(weights, merging=None, alignment=None)
    for name, tensor in result.tensors().items():
        assert torch.equal(tensor, weights.tensors()[name][GROUPS.dominant_of_group])


def test_a_group_that_was_never_used_keeps_its_dominant_expert(weights):
    for name, tensor in merged(weights).tensors().items():
        assert torch.equal(tensor[2], weights.tensors()[name][6])


def test_members_that_were_never_used_and_dropped_experts_leave_no_trace(weights):
    before = merged(weights)
    changed = mapped(torch.clone, weights)
    for tensor in changed.tensors().values():
        tensor[[2, 3, 4, 7]] = torch.randn(4, *tensor.shape[1:], generator=torch.Generator().manual_seed(5))
    assert_close(merged(changed), before)


def test_nothing_is_written_into_the_old_experts(weights):
    before = mapped(torch.clone, weights)
    merged(weights)
    assert all(torch.equal(tensor, before.tensors()[name]) for name, tensor in weights.tensors().items())


def test_the_result_may_be_views_of_fused_parameters():
    weights = random_weights(FORMATS["gated"])
    fused, down = torch.zeros(4, 2 * WIDTH, HIDDEN), torch.zeros(4, WIDTH, HIDDEN)
    into = ExpertWeights(gate=fused[:, :WIDTH], up=fused[:, WIDTH:], down=down.transpose(1, 2))
    merge_groups(weights, GROUPS, Recipe(), IMPORTANCE, into)
    expected = slow_merge(weights, GROUPS, IMPORTANCE)
    torch.testing.assert_close(fused.double(), torch.cat([expected.gate, expected.up], dim=1))
    torch.testing.assert_close(down.double(), expected.down.transpose(1, 2))


# --- symmetries


def test_permuting_the_neurons_of_any_expert_permutes_those_of_the_result_with_its_dominant(weights):
    order = random_orders()
    result, permuted = merged(weights), merged(weights.permute_neurons(order))
    assert_close(permuted, result.permute_neurons(order[GROUPS.dominant_of_group]))
    for group in range(GROUPS.num_groups):
        torch.testing.assert_close(outputs(permuted, group), outputs(result, group), rtol=1e-5, atol=1e-5)


def test_permuting_the_neurons_of_members_changes_no_number(weights):
    order = random_orders()
    order[GROUPS.dominant_of_group] = torch.arange(WIDTH)
    assert_close(merged(weights.permute_neurons(order)), merged(weights), rtol=0, atol=0)


def test_without_alignment_that_would_not_hold():
    weights = random_weights(FORMATS["gated"])
    plain = [merged(w, alignment=None) for w in (weights, weights.permute_neurons(random_orders()))]
    assert (outputs(plain[0], 1) - outputs(plain[1], 1)).abs().max() > 0.1


@pytest.mark.parametrize("merging", OPERATORS)
def test_neuron_permuted_copies_merge_without_loss(weights, merging):
    dominant_of_expert = GROUPS.dominant_of_group[GROUPS.group_of_expert]
    copies = mapped(lambda tensor: tensor[dominant_of_expert], weights).permute_neurons(random_orders())
    result = merged(copies, merging=merging)
    for expert, group in enumerate(GROUPS.group_of_expert.tolist()):
        if group >= 0:
            torch.testing.assert_close(outputs(result, group), outputs(copies, expert), rtol=1e-5, atol=1e-5)


def layer_of(num_experts, num_router_groups=1):
    nothing = nn.Identity()
    return MoeLayer(
        name="layer.experts",
        experts=nothing,
        router_name="layer.gate",
        router=nothing,
        block_name="layer",
        block=nothing,
        num_slots=num_experts,
        num_experts=num_experts,
        top_k=2,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        format=ExpertFormat(),
        family=None,
        num_router_groups=num_router_groups,
    )


def statistics_of(count, seed=0, shift=0.0):
    logits = torch.randn(40, len(count), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    return LayerStatistics(num_tokens=40, selection_count=torch.tensor(count), sums={"logit_gram": logits.T @ logits})


@pytest.mark.parametrize("num_groups", [1, 3, 4, 9])
def test_relabelling_experts_commutes_with_compression(weights, num_groups):
    count = [3, 11, 0, 7, 1, 5, 20, 2, 13, 4]  # no ties, rank != id
    statistics = statistics_of(count)
    relabelled = torch.randperm(NUM_EXPERTS, generator=torch.Generator().manual_seed(3))  # new expert j was this one
    new_statistics = LayerStatistics(
        num_tokens=40,
        selection_count=statistics.selection_count[relabelled],
        sums={"logit_gram": statistics["logit_gram"][relabelled][:, relabelled]},
    )
    new_weights = mapped(lambda tensor: tensor[relabelled], weights)
    layer = layer_of(NUM_EXPERTS)
    groups, _ = group_experts(layer, Recipe(), statistics, weights, num_groups)
    new_groups, _ = group_experts(layer, Recipe(), new_statistics, new_weights, num_groups)
    old = merged(weights, groups, statistics.usage_frequency)
    new = merged(new_weights, new_groups, new_statistics.usage_frequency)
    of_expert = mapped(lambda tensor: tensor[groups.group_of_expert[relabelled]], old)
    assert_close(mapped(lambda tensor: tensor[new_groups.group_of_expert], new), of_expert)


# --- grouping by a recipe


def test_a_native_group_limited_router_keeps_the_same_number_of_rows_in_each_group():
    statistics, weights = statistics_of([9, 8, 7, 6, 4, 3, 2, 1]), random_weights(FORMATS["gated"], 8)
    layer = layer_of(8, num_router_groups=2)
    native, _ = group_experts(layer, Recipe(layout="native"), statistics, weights, 4)
    assert native.dominant_of_group.tolist() == [0, 1, 4, 5]
    mapped_layout, _ = group_experts(layer, Recipe(), statistics, weights, 4)
    assert mapped_layout.dominant_of_group.tolist() == [0, 1, 2, 3]


def test_options_of_a_recipe_reach_the_step():
    count = [1, 5, 2, 9, 0, 7, 3, 4]
    statistics, weights = statistics_of(count, shift=10.0), random_weights(FORMATS["gated"], 8)
    recipe = Recipe(similarity_options={"center": True})
    similarity = router_logit_similarity(statistics, weights, center=True)
    expected = group_around_dominant_experts(torch.tensor(count), similarity, 4)
    groups, _ = group_experts(layer_of(8), recipe, statistics, weights, 4)
    assert torch.equal(groups.group_of_expert, expected.group_of_expert)
    uncentered, _ = group_experts(layer_of(8), Recipe(), statistics, weights, 4)
    assert not torch.equal(uncentered.group_of_expert, expected.group_of_expert)


def test_pruning_asks_for_no_similarity():
    statistics = LayerStatistics(num_tokens=9, selection_count=torch.tensor([1, 4, 0, 4]))
    recipe = Recipe(grouping="drop", similarity=None, alignment=None, merging=None)
    groups, _ = group_experts(layer_of(4), recipe, statistics, random_weights(FORMATS["gated"], 4), 2)
    assert groups.group_of_expert.tolist() == [-1, 0, -1, 1]


# --- measures


def sample_of(*indices):
    batches = [torch.tensor(index) for index in indices]
    return LayerInputs([(torch.ones(len(index), 2), index, torch.ones(index.shape)) for index in batches])


def test_duplicate_share_counts_the_slots_whose_expert_the_token_has_already():
    groups = ExpertGroups(torch.tensor([0, 0, 1, -1, -1, 0]), torch.tensor([0, 2]))
    # Groups by token: [0 0 0] 2 duplicates, [1 - -] none (dropped slots compute nothing), [0 1 0] 1, [- 0 1] none.
    sample = sample_of([[0, 1, 5], [2, 3, 4], [5, 2, 1]], [[4, 1, 2]])
    assert duplicate_share(groups, sample) == 3 / 12
    assert duplicate_share(groups, LayerInputs()) is None
    assert duplicate_share(ExpertGroups(torch.arange(6), torch.arange(6)), sample) == 0


def test_relative_error_is_the_changed_share_of_the_energy():
    before = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [5.0, 5.0]])]  # energy 25 + 50
    after = [torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0], [5.0, 6.0]])]  # change 9 + 2
    assert relative_error(before, after) == pytest.approx(11 / 75)
    assert relative_error(before, before) == 0
    assert relative_error([], []) is None
    assert relative_error([torch.zeros(1, 2)], [torch.ones(1, 2)]) is None


@torch.no_grad()
def test_outputs_are_those_of_the_sampled_choice_or_of_the_router_asked_again():
    layer = find_layers(tiny_model("mixtral"))[0]
    hidden_states = torch.randn(5, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    whole_block = layer.block(hidden_states[None])[0]
    _, weights, index = layer.router(hidden_states)
    sample = LayerInputs([(hidden_states, index, weights)], [((hidden_states,), {})])
    torch.testing.assert_close(routed_output(layer, sample)[0], whole_block)
    sample.experts_inputs[0] = (hidden_states, (index + 1) % layer.num_slots, weights)  # another choice
    assert (routed_output(layer, sample)[0] - whole_block).abs().max() > 1e-3
    torch.testing.assert_close(routed_output(layer, sample, reroute=True)[0], whole_block)


@pytest.mark.parametrize(
    "asked, share, collapses",
    [
        ("auto", WORTH_COLLAPSING, True),
        ("auto", WORTH_COLLAPSING / 2, False),
        ("auto", None, False),
        (True, None, True),
        (False, 1.0, False),
    ],
)
def test_duplicates_are_collapsed_as_asked_or_where_there_are_enough(asked, share, collapses):
    assert worth_collapsing(Recipe(collapse_duplicates=asked), share) is collapses
