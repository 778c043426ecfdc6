"""DERN against its steps written out: segments assigned by cosine, clustered in each kept expert, norms restored."""

import pytest
import torch
from method_models import MODELS, NUM_EXPERTS, assert_experts_close, experts_now, method_model, seen_by_layers

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.merging import MERGING
from hf_mcsmoe.merging.recombined_segments import merge_by_recombining_segments
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.solvers.segments import assign_segments, spherical_kmeans, transferred_share
from hf_mcsmoe.types import ExpertGroups, ExpertWeights


def segment(weights, expert, a):
    """The parts of one segment: gate, up, down, biases behind their rows."""
    parts = []
    for name in ("gate", "up", "down"):
        matrix = getattr(weights, name)
        if matrix is None:
            continue
        row = matrix[expert][:, a] if name == "down" else matrix[expert][a]
        bias = getattr(weights, f"{name}_bias") if name != "down" else None
        parts.append(row if bias is None else torch.cat([row, bias[expert, a, None]]))
    return parts


def cosine(left, right):
    left, right = torch.cat(left), torch.cat(right)
    return (left @ right / (left.norm() * right.norm())).item()


def slow_assignment(weights, kept, threshold):
    """{(expert, segment): kept expert or None}, one pair of segments after another."""
    width = weights.up.shape[1]
    found = {}
    for expert in range(len(weights.up)):
        for a in range(width):
            found[expert, a] = expert if expert in kept else None
            best = -2.0
            for other in kept if expert not in kept else ():
                for b in range(width):
                    alike = cosine(segment(weights, expert, a), segment(weights, other, b))
                    if alike >= threshold and alike > best + 1e-9:
                        best, found[expert, a] = alike, other
    return found


def slow_dern(weights, kept, frequency, threshold, iterations=10):
    """The kept experts after the method, as ExpertWeights."""
    width, where = weights.up.shape[1], slow_assignment(weights, kept, threshold)
    tensors = {name: tensor[kept].clone() for name, tensor in weights.tensors().items()}
    for group, leader in enumerate(kept):
        mine = [(leader, a) for a in range(width)]
        mine += sorted(place for place, to in where.items() if to == leader and place[0] != leader)
        if len(mine) == width:
            continue
        parts = [segment(weights, *place) for place in mine]
        points = [torch.cat(one) / torch.cat(one).norm() for one in parts]
        weight = [frequency[expert] for expert, _ in mine]
        centres, label = points[:width], None
        for _ in range(iterations + 1):
            new = [max(range(width), key=lambda c: ((point @ centres[c]).item(), -c)) for point in points]
            if new == label:
                break
            label = new
            for c in range(width):
                inside = [i for i, of in enumerate(label) if of == c]
                shares = [weight[i] for i in inside] if sum(weight[i] for i in inside) > 0 else [1.0] * len(inside)
                if inside:
                    total = sum(s * points[i] for s, i in zip(shares, inside, strict=True))
                    centres[c] = total / total.norm()
        for c in range(width):
            inside = [i for i, of in enumerate(label) if of == c]
            if len(inside) == 1 and inside[0] == c:
                continue
            shares = [weight[i] for i in inside] if sum(weight[i] for i in inside) > 0 else [1.0] * len(inside)
            centre = []
            for number in range(len(parts[0])):
                mean = sum(s * parts[i][number] for s, i in zip(shares, inside, strict=True)) / sum(shares)
                length = sum(s * parts[i][number].norm() for s, i in zip(shares, inside, strict=True)) / sum(shares)
                centre.append(mean / mean.norm() * length)
            for name, part in zip([n for n in ("gate", "up", "down") if n in tensors], centre, strict=True):
                if name == "down":
                    tensors[name][group, :, c] = part
                else:
                    hidden = weights.up.shape[2]
                    tensors[name][group, c] = part[:hidden]
                    if f"{name}_bias" in tensors:
                        tensors[f"{name}_bias"][group, c] = part[hidden]
    return ExpertWeights(**tensors)


def slow_rows(rows, where, kept, width):
    """Rows of the kept, and of each dropped expert the share that its segments are which went there."""
    moved = rows[kept].clone()
    for (expert, _), receiver in where.items():
        if receiver is not None and expert not in kept:
            moved[kept.index(receiver)] += rows[expert] / width
    return moved


@pytest.mark.parametrize("name", MODELS)
def test_the_preset_is_the_method(name, tokens):
    width = "intermediate_size" if name == "mixtral" else "moe_intermediate_size"
    model, tokens, half = method_model(name, **{width: 4}), tokens[:4], NUM_EXPERTS[name] // 2
    seen = seen_by_layers(model, tokens)
    rows = [one.layer.router.weight.detach().clone() for one in seen]
    recipe = recipe_from_preset("dern", merging_options={"threshold": 0.2})
    compress_moe(model, recipe, calibration=load_calibration(tokens, held_out_fraction=0), progress=False)
    for of_layer, found, report, row in zip(
        seen, experts_now(model), model.compression_report.layers, rows, strict=True
    ):
        count = of_layer.counts()
        kept = sorted(sorted(range(len(count)), key=lambda e: (-count[e], e))[:half])
        assert report.dominant_of_group == kept
        where = slow_assignment(of_layer.weights, kept, 0.2)
        assert {None, kept[0], kept[-1]} <= set(where.values())
        frequency = [number / sum(count) for number in count]
        assert_experts_close(found, slow_dern(of_layer.weights, kept, frequency, 0.2))
        torch.testing.assert_close(of_layer.layer.router.weight, slow_rows(row, where, kept, of_layer.weights.width))


def test_the_recipe_is_native_and_collects_counts_alone():
    recipe = recipe_from_preset("dern")
    assert recipe.layout == "native" and recipe.grouping == "drop" and recipe.alignment is None
    assert recipe.statistics_needed() == {"selection_count"} and not recipe.needs_inputs


FORMATS = {
    "gated": ("gate", "up", "down"),
    "ungated": ("up", "down"),
    "gated-bias": ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"),
    "ungated-bias": ("up", "down", "up_bias", "down_bias"),
}
GROUPS = ExpertGroups(torch.tensor([-1, 0, 1, -1, 0, 2]), torch.tensor([1, 2, 5]))
IMPORTANCE = torch.tensor([0.3, 0.1, 0.2, 0.0, 0.4, 0.0], dtype=torch.float64)


def random_weights(names=FORMATS["gated"], num_experts=6, width=5, hidden=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    shapes |= {"gate_bias": (width,), "up_bias": (width,), "down_bias": (hidden,)}
    return ExpertWeights(**{name: torch.randn(num_experts, *shapes[name], generator=generator) for name in names})


def wide(weights):
    return ExpertWeights(**{name: tensor.double() for name, tensor in weights.tensors().items()})


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.6])
@pytest.mark.parametrize("names", FORMATS.values(), ids=FORMATS.keys())
def test_recombining_equals_the_steps_written_out(names, threshold):
    weights = random_weights(names)
    found = merge_by_recombining_segments(weights, GROUPS, IMPORTANCE, threshold=threshold)
    expected = slow_dern(wide(weights), [1, 2, 5], IMPORTANCE.tolist(), threshold)
    assert_experts_close(wide(found), expected)
    assert all(tensor.dtype == torch.float32 for tensor in found.tensors().values())


def test_a_threshold_of_one_leaves_the_kept_experts_bit_by_bit():
    weights = random_weights()
    found = merge_by_recombining_segments(weights, GROUPS, IMPORTANCE, threshold=1.0)
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, weights.tensors()[name][[1, 2, 5]])
    everyone = torch.arange(6)
    found = merge_by_recombining_segments(weights, ExpertGroups(everyone, everyone), IMPORTANCE, threshold=-1.0)
    assert all(torch.equal(tensor, weights.tensors()[name]) for name, tensor in found.tensors().items())


def test_segments_of_one_expert_go_to_different_experts_and_some_nowhere():
    # Kept: 0 with the segments e1, e2 and 1 with e3, e4. Dropped: 2 with -e1 (like none of them), e3 + e4 / 2.
    weights = ExpertWeights(up=torch.zeros(3, 2, 4), down=torch.zeros(3, 4, 2))
    for expert, rows in enumerate(([[1, 0, 0, 0], [0, 1, 0, 0]], [[0, 0, 1, 0], [0, 0, 0, 1]])):
        weights.up[expert] = torch.tensor(rows)
    weights.up[2] = torch.tensor([[-1.0, 0, 0, 0], [0, 0, 1, 0.5]])
    kept = torch.tensor([0, 1])
    assert assign_segments(weights, kept, 0.5).tolist() == [[0, 0], [1, 1], [-1, 1]]
    assert assign_segments(weights, kept, 0.9).tolist() == [[0, 0], [1, 1], [-1, -1]]
    assert assign_segments(weights, kept, -1.0).tolist() == [[0, 0], [1, 1], [0, 1]]  # 0 to three of them: the lowest
    share = transferred_share(assign_segments(weights, kept, 0.5), 2)
    assert share.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]] and share.dtype == torch.float64
    # e3 and e3 + e4 / 2 with weights 3 and 1: direction (0, 0, 4, 0.5) / 4, length (3 + |(1, 0.5)|) / 4.
    groups = ExpertGroups(torch.tensor([0, 1, -1]), kept)
    found = merge_by_recombining_segments(weights, groups, torch.tensor([1.0, 3.0, 1.0]), threshold=0.5)
    direction = torch.tensor([0.0, 0.0, 4.0, 0.5])
    expected = direction / direction.norm() * (3 + 1.25**0.5) / 4
    torch.testing.assert_close(found.up[1, 0], expected)
    assert torch.equal(found.up[0], weights.up[0]) and torch.equal(found.up[1, 1], weights.up[1, 1])


def test_router_rules_are_told_the_shares_that_went_where_the_merge_put_them():
    weights = random_weights()
    share = MERGING.trait("recombined_segments", "transfer")(weights, GROUPS, {"threshold": 0.3, "iterations": 10})
    where = slow_assignment(wide(weights), [1, 2, 5], 0.3)
    for expert in range(6):
        for group, leader in enumerate([1, 2, 5]):
            assert share[expert, group] == sum(where[expert, a] == leader for a in range(5)) / 5


def test_the_result_does_not_depend_on_the_order_of_the_neurons_of_any_expert():
    weights = random_weights()
    order = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(seed)) for seed in range(6)])
    before = merge_by_recombining_segments(weights, GROUPS, IMPORTANCE, threshold=0.3)
    after = merge_by_recombining_segments(weights.permute_neurons(order), GROUPS, IMPORTANCE, threshold=0.3)
    assert_experts_close(after, before.permute_neurons(order[[1, 2, 5]]))


def test_kmeans_worked_by_hand_with_weights_that_are_zero():
    # Rows 0 and 1 are the centres. Row 2 is nearer to 0; with all the weight it draws centre 0, row 3 follows.
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0], [0.9, 1.0]])
    assert spherical_kmeans(rows, torch.tensor([0.0, 1.0, 9.0, 0.0]), 2, 10).tolist() == [0, 1, 0, 0]
    assert spherical_kmeans(rows, torch.tensor([9.0, 1.0, 0.0, 0.0]), 2, 10).tolist() == [0, 1, 0, 1]
    assert spherical_kmeans(rows, torch.zeros(4), 2, 10).tolist() == [0, 1, 0, 1]


def test_segments_of_zeros_give_numbers():
    weights = random_weights()
    weights.gate[1, 0] = weights.up[1, 0] = 0
    weights.down[1, :, 0] = 0
    weights.gate[0, 1] = 0
    for importance in (IMPORTANCE, torch.zeros(6)):
        found = merge_by_recombining_segments(weights, GROUPS, importance, threshold=-1.0)
        assert all(torch.isfinite(tensor).all() for tensor in found.tensors().values())


@pytest.mark.parametrize(
    "options, why", [({"threshold": 1.5}, "threshold is 1.5"), ({"iterations": 0}, "iterations is 0")]
)
def test_options_that_cannot_be_are_refused(options, why):
    with pytest.raises(ValueError, match=f"{why}, it must be"):
        Recipe(merging="recombined_segments", merging_options=options)
