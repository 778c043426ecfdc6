"""TIES and ZipIt as operators for any grouping, against their definitions written out."""

import itertools
import math

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
    slow_clusters,
    slow_m_smoe_groups,
)
from test_method_least_squares import IMPORTANCE, output, random_members, states, tokens_of
from torch.nn.functional import silu

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.merging.ties import merge_by_ties
from hf_mcsmoe.merging.zipit import correlations, merge_by_zipping
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.types import ExpertWeights


def compressed(model, preset, tokens, **changes):
    recipe = recipe_from_preset(preset, allocation="uniform", **changes)
    compress_moe(model, recipe, calibration=load_calibration(tokens, held_out_fraction=0), progress=False)
    return experts_now(model)


# --- TIES


def slow_ties(members, density, scale, base):
    """Entry by entry: trim each difference, elect the sign of the sum, average the entries of that sign."""
    members = members.double()
    start = members[0] if base == "dominant" else members.mean(0)
    differences = [(member - start).flatten().tolist() for member in members]
    for one in differences:
        number = math.ceil(density * len(one))
        kept = sorted(range(len(one)), key=lambda place: (-abs(one[place]), place))[:number]
        one[:] = [value if place in kept else 0.0 for place, value in enumerate(one)]
    merged = []
    for place, value in enumerate(start.flatten().tolist()):
        entries = [one[place] for one in differences]
        same = [entry for entry in entries if entry * sum(entries) > 0 and abs(sum(entries)) > 1e-9]
        merged.append(value + scale * (sum(same) / len(same) if same else 0.0))
    return torch.tensor(merged).view_as(start).float()


@pytest.mark.parametrize("base", ["dominant", "mean"])
@pytest.mark.parametrize("density", [0, 0.2, 0.5, 1])
@pytest.mark.parametrize("num", [2, 3, 5])
def test_ties_equals_the_definition(num, density, base):
    members = torch.randn(num, 4, 6, generator=torch.Generator().manual_seed(num))
    found = merge_by_ties(members, torch.ones(num), density=density, scale=0.7, base=base)
    torch.testing.assert_close(found, slow_ties(members, density, 0.7, base))


def test_ties_worked_by_hand_moves_towards_the_members():
    # Differences from the first: (4, -1, 2, 3) and (2, 1, -6, 1). Half of each stays: (4, ., ., 3), (2, ., -6, .).
    members = torch.tensor([[[0.0, 0, 0, 10]], [[4.0, -1, 2, 13]], [[2.0, 1, -6, 11]]])
    found = merge_by_ties(members, torch.ones(3), density=0.5)
    assert found.tolist() == [[3.0, 0.0, -6.0, 13.0]]
    assert merge_by_ties(members, torch.ones(3), density=0.5, scale=0.5).tolist() == [[1.5, 0.0, -3.0, 11.5]]
    # All entries: signs +, 0 (a tie: nothing is added), -, +.
    assert merge_by_ties(members, torch.ones(3), density=1).tolist() == [[3.0, 0.0, -6.0, 12.0]]
    # The mean of two is their mean whatever stays.
    assert merge_by_ties(members[:2], torch.ones(2), base="mean").tolist() == [[2.0, -0.5, 1.0, 11.5]]


@pytest.mark.parametrize("name", MODELS)
def test_the_preset_is_ties_in_the_groups_of_m_smoe(name, tokens):
    model = method_model(name)
    seen = seen_by_layers(model, tokens)
    for of_layer, found in zip(seen, compressed(model, "m-smoe-ties", tokens, alignment=None), strict=True):
        groups = slow_m_smoe_groups(of_layer, cosines(of_layer.logits.T), NUM_EXPERTS[name] // 2)
        expected = {
            key: torch.stack([slow_ties(tensor[members].float(), 0.2, 1.0, "dominant") for members in groups]).double()
            for key, tensor in of_layer.weights.tensors().items()
        }
        assert_experts_close(found, ExpertWeights(**expected))


def test_the_plain_mean_is_a_preset(tokens):
    model = method_model("mixtral")
    seen = seen_by_layers(model, tokens)
    for of_layer, found in zip(seen, compressed(model, "m-smoe-average", tokens, alignment=None), strict=True):
        groups = slow_m_smoe_groups(of_layer, cosines(of_layer.logits.T), 4)
        expected = {
            key: torch.stack([sum(tensor[e] for e in members) / len(members) for members in groups])
            for key, tensor in of_layer.weights.tensors().items()
        }
        assert_experts_close(found, ExpertWeights(**expected))


@pytest.mark.parametrize(
    "options, why",
    [
        ({"density": 1.1}, r"density is 1\.1, it must be in \[0, 1\]"),
        ({"scale": float("inf")}, "scale is inf, it must be in"),
        ({"base": "dominnt"}, "base is 'dominnt', allowed are .*Did you mean 'dominant'"),
    ],
)
def test_options_of_ties_that_cannot_be_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        Recipe(merging="ties", merging_options=options)


# --- ZipIt


def slow_correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return ((a @ b) / (a.norm() * b.norm())).item() if a.norm() > 0 and b.norm() > 0 else 0.0


def slow_zip(weights, members, shares, acts):
    """(gate, up, down) of one group of members whose activations (T, I) are `acts`, neuron by neuron."""
    neurons = [(member, a) for member in range(len(members)) for a in range(weights.width)]
    columns = [acts[member][:, a] for member, a in neurons]
    apart = torch.tensor([[1 - slow_correlation(p, q) for q in columns] for p in columns])
    gate, up, down = [], [], []
    for cluster in slow_clusters(apart, weights.width):
        weight = [shares[neurons[place][0]] for place in cluster]
        weight = weight if sum(weight) > 0 else [1.0] * len(cluster)
        at = [(members[neurons[place][0]], neurons[place][1]) for place in cluster]
        for into, tensor in ((gate, weights.gate), (up, weights.up)):
            into.append(sum(w * tensor[e, a] for w, (e, a) in zip(weight, at, strict=True)) / sum(weight))
        down.append(sum(shares[members.index(e)] * weights.down[e, :, a] for e, a in at))
    return torch.stack(gate), torch.stack(up), torch.stack(down, dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_the_preset_is_zipit_in_the_groups_of_m_smoe(name, tokens):
    width = "intermediate_size" if name == "mixtral" else "moe_intermediate_size"
    model, tokens = method_model(name, **{width: 4}), tokens[:8]
    seen = seen_by_layers(model, tokens)
    joined = 0
    for of_layer, found in zip(seen, compressed(model, "m-smoe-zipit", tokens), strict=True):
        count, weights, expected = of_layer.counts(), of_layer.weights, []
        for members in slow_m_smoe_groups(of_layer, cosines(of_layer.logits.T), NUM_EXPERTS[name] // 2):
            if len(members) == 1:
                expected.append([tensor[members[0]] for tensor in (weights.gate, weights.up, weights.down)])
                continue
            joined += 1
            shares = [count[e] / sum(count[m] for m in members) for e in members]
            acts = [of_layer.activations(e) for e in members]
            expected.append(slow_zip(weights, members, shares, acts))
        gate, up, down = (torch.stack(one) for one in zip(*expected, strict=True))
        assert_experts_close(found, ExpertWeights(gate=gate, up=up, down=down))
    assert joined > 2
    recipe = recipe_from_preset("m-smoe-zipit")
    assert recipe.needs_inputs and recipe.alignment is None and recipe.layout == "mapped"


@pytest.mark.parametrize("importance", [[3.0, 1.0, 4.0], [0.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
def test_zipit_equals_the_definition_also_with_members_that_were_never_used(importance):
    members, x = random_members(width=5), states(80)
    found = merge_by_zipping(members, torch.tensor(importance), tokens=tokens_of(x))
    total = sum(importance)
    shares = [value / total for value in importance] if total else [1.0, 0.0, 0.0]
    wide = ExpertWeights(**{name: tensor.double() for name, tensor in members.tensors().items()})
    acts = [silu(x.double() @ g.T) * (x.double() @ u.T) for g, u in zip(wide.gate, wide.up, strict=True)]
    expected = slow_zip(wide, [0, 1, 2], shares, acts)
    for tensor, slow in zip((found.gate, found.up, found.down), expected, strict=True):
        torch.testing.assert_close(tensor[0].double(), slow, rtol=1e-4, atol=1e-5)


def test_copies_in_any_order_of_their_neurons_are_zipped_without_loss():
    one, x = random_members(1, width=6, bias=True), states(80)
    copies = ExpertWeights(**{name: t.expand(3, *t.shape[1:]) for name, t in one.tensors().items()})
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    merged = merge_by_zipping(copies.permute_neurons(order), IMPORTANCE, tokens=tokens_of(x))
    torch.testing.assert_close(output(merged, 0, x), output(one, 0, x), rtol=1e-4, atol=1e-4)


def test_two_neurons_of_one_member_may_become_one():
    # Member 0 has a neuron twice, member 1 two neurons like no other: the twins join, no two of different members.
    members, x = random_members(2, width=2, seed=4), states(300)
    for tensor in (members.gate, members.up):
        tensor[0, 1] = tensor[0, 0]
    alike = correlations(members, tokens_of(x))
    assert alike[0, 1] == pytest.approx(1.0, abs=1e-6) and alike[0, 2:].abs().max() < 0.9
    merged = merge_by_zipping(members, torch.ones(2), tokens=tokens_of(x))
    assert any(torch.allclose(row, members.gate[0, 0], atol=1e-6) for row in merged.gate[0])
    twins = members.down[0].sum(dim=1) / 2
    assert any(torch.allclose(column, twins, atol=1e-6) for column in merged.down[0].T)


def test_the_result_does_not_depend_on_the_order_of_the_neurons():
    members, x = random_members(3, width=6), states(80)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    before, after = (
        merge_by_zipping(one, IMPORTANCE, tokens=tokens_of(x)) for one in (members, members.permute_neurons(order))
    )
    torch.testing.assert_close(output(before, 0, x), output(after, 0, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_few_tokens_and_silent_neurons_give_numbers(number):
    members = random_members(3)
    members.gate[1, 2] = 0
    merged = merge_by_zipping(members, IMPORTANCE, tokens=tokens_of(states(number)))
    assert all(torch.isfinite(tensor).all() for tensor in merged.tensors().values())
    alike = correlations(members, tokens_of(states(40)))
    assert alike[6].count_nonzero() == 0  # neuron 2 of member 1


def test_correlations_take_the_memory_that_they_say_and_large_groups_are_refused():
    members, x = random_members(3, width=4), states(30)
    alike = correlations(members, tokens_of(x))
    assert alike.shape == (12, 12) and alike.dtype == torch.float64
    for (one, a), (other, b) in itertools.product(itertools.product(range(3), range(4)), repeat=2):
        acts = [
            silu(x.double() @ members.gate[e, n].double()) * (x.double() @ members.up[e, n].double())
            for e, n in ((one, a), (other, b))
        ]
        assert alike[4 * one + a, 4 * other + b].item() == pytest.approx(slow_correlation(*acts), abs=1e-4)
    with pytest.raises(ValueError, match=r"max_neurons is 11, but a group of 3 experts has 12 neurons\. Make smaller"):
        merge_by_zipping(members, IMPORTANCE, tokens=tokens_of(x), max_neurons=11)
    with pytest.raises(ValueError, match="max_neurons is 0, it must be a whole number >= 1"):
        Recipe(merging="zipit", merging_options={"max_neurons": 0})
