"""The values refuse what breaks their invariants, and reordering neurons changes no function."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import relu, silu

from hf_mcsmoe.types import CompressionReport, ExpertGroups, ExpertWeights, LayerStatistics

N, WIDTH, D = 3, 5, 4
FORMATS = {
    "gated": (True, False),
    "ungated": (False, False),
    "gated-bias": (True, True),
    "ungated-bias": (False, True),
}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def weights(request):
    has_gate, has_bias = request.param
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (N, WIDTH, D), "down": (N, D, WIDTH)}
    if has_bias:
        shapes |= {"up_bias": (N, WIDTH), "down_bias": (N, D)}
    if has_gate:
        shapes |= {"gate": (N, WIDTH, D)} | ({"gate_bias": (N, WIDTH)} if has_bias else {})
    return ExpertWeights(**{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def expert_output(weights, expert, x):
    """One expert on one token, written out: down @ (act(gate @ x) * (up @ x)), or down @ relu(up @ x)."""
    tensors = {name: tensor[expert] for name, tensor in weights.tensors().items()}
    neurons = tensors["up"] @ x + tensors.get("up_bias", 0)
    if "gate" in tensors:
        neurons = silu(tensors["gate"] @ x + tensors.get("gate_bias", 0)) * neurons
    else:
        neurons = relu(neurons)
    return tensors["down"] @ neurons + tensors.get("down_bias", 0)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("down", (N, WIDTH, D)),  # not transposed
        ("gate", (N, D, WIDTH)),
        ("up_bias", (N, D)),
        ("down_bias", (N, WIDTH)),
        ("gate_bias", (WIDTH,)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_by_name(name, shape):
    tensors = {"up": torch.zeros(N, WIDTH, D), "down": torch.zeros(N, D, WIDTH), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"^{name} has shape \({', '.join(map(str, shape))},?\), expected \(3, "):
        ExpertWeights(**tensors)


def test_sizes_and_names_are_those_of_the_tensors(weights):
    assert (weights.num_experts, weights.width) == (N, WIDTH)
    present = {name for name, value in vars(weights).items() if value is not None}
    assert set(weights.tensors()) == present


def test_permuting_neurons_changes_no_expert(weights):
    order = torch.stack([torch.tensor(p) for p in ([2, 0, 4, 1, 3], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4])])
    permuted = weights.permute_neurons(order)
    for x in torch.randn(6, D, generator=torch.Generator().manual_seed(1)):
        for expert in range(N):
            torch.testing.assert_close(expert_output(permuted, expert, x), expert_output(weights, expert, x))


def test_order_names_the_neuron_that_comes_to_each_place(weights):
    order = torch.tensor([[2, 0, 4, 1, 3]]).repeat(N, 1)
    permuted = weights.permute_neurons(order)
    for expert in range(N):
        for place, neuron in enumerate(order[expert].tolist()):
            assert torch.equal(permuted.up[expert, place], weights.up[expert, neuron])
            assert torch.equal(permuted.down[expert, :, place], weights.down[expert, :, neuron])
            if weights.gate is not None:
                assert torch.equal(permuted.gate[expert, place], weights.gate[expert, neuron])
            if weights.up_bias is not None:
                assert permuted.up_bias[expert, place] == weights.up_bias[expert, neuron]
                assert torch.equal(permuted.down_bias, weights.down_bias)


def test_the_row_of_a_neuron_holds_all_numbers_that_move_with_it(weights):
    rows = weights.neurons(1)
    for neuron in range(WIDTH):
        numbers = [weights.up[1, neuron], weights.down[1, :, neuron]]
        numbers += [weights.gate[1, neuron]] if weights.gate is not None else []
        biases = [bias[1, neuron] for bias in (weights.up_bias, weights.gate_bias) if bias is not None]
        expected = torch.cat([*numbers, torch.tensor(biases)])
        assert rows[neuron].sort().values.tolist() == expected.sort().values.tolist()
    half = ExpertWeights(**{name: tensor.half() for name, tensor in weights.tensors().items()})
    assert half.neurons(1).dtype == torch.float32


def test_writing_into_weights_writes_into_the_parameter_they_view():
    fused = torch.zeros(N, 2 * WIDTH, D)
    weights = ExpertWeights(gate=fused[:, :WIDTH], up=fused[:, WIDTH:], down=torch.zeros(N, D, WIDTH))
    weights.up[1] = 7.0
    assert torch.equal(fused[1, WIDTH:], torch.full((WIDTH, D), 7.0))
    assert fused.sum() == 7.0 * WIDTH * D


GROUPS = ExpertGroups(group_of_expert=torch.tensor([1, 0, -1, 1, 0, 1]), dominant_of_group=torch.tensor([1, 3]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dominant_of_group": [3, 1]}, r"dominant_of_group must ascend, got \[3, 1\]"),
        ({"dominant_of_group": [1, 1]}, r"dominant_of_group must ascend, got \[1, 1\]"),
        ({"dominant_of_group": [1, 4]}, r"its experts are in groups \[0, 0\], expected \[0, 1\]"),
        ({"dominant_of_group": [1, 2]}, r"its experts are in groups \[0, -1\], expected \[0, 1\]"),  # leads, dropped
        ({"dominant_of_group": [0, 1]}, r"its experts are in groups \[1, 0\], expected \[0, 1\]"),  # swapped
        ({"dominant_of_group": [-2, 3]}, r"dominant_of_group must stay in 0..5, got \[-2, 3\]"),
        ({"dominant_of_group": [1, 6]}, r"dominant_of_group must stay in 0..5, got \[1, 6\]"),
        ({"group_of_expert": [1, 0, -2, 1, 0, 1]}, r"group_of_expert must stay in -1..1, got \[1, 0, -2, 1, 0, 1\]"),
        ({"group_of_expert": [1, 0, 2, 1, 0, 1]}, r"group_of_expert must stay in -1..1, got \[1, 0, 2, 1, 0, 1\]"),
    ],
)
def test_groups_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(GROUPS, **{name: torch.tensor(value) for name, value in changes.items()})


def test_members_start_with_the_dominant_expert_and_then_ascend():
    assert GROUPS.num_groups == 2
    assert GROUPS.members(0).tolist() == [1, 4]
    assert GROUPS.members(1).tolist() == [3, 0, 5]  # expert 2 is dropped: in no group


def test_usage_frequency_is_the_share_of_all_selections():
    counts = LayerStatistics(num_tokens=6, selection_count=torch.tensor([1, 0, 4, 3]))
    assert counts.usage_frequency.tolist() == [0.125, 0.0, 0.5, 0.375]
    assert counts.usage_frequency.dtype == torch.float64
    nothing = LayerStatistics(num_tokens=6, selection_count=torch.zeros(3, dtype=torch.int64))
    assert nothing.usage_frequency.tolist() == [0.0, 0.0, 0.0]


def test_a_report_is_plain_enough_for_json():
    numbers = dict.fromkeys(("total_parameters_before", "total_parameters_after"), 8)
    numbers |= dict.fromkeys(("total_bytes_before", "total_bytes_after"), 16)
    report = CompressionReport(
        recipe={"keep": 0.5},
        calibration=None,
        layers=[],
        base_model=None,
        base_architecture="MixtralForCausalLM",
        seconds=0.5,
        versions={"torch": "2"},
        **numbers,
    )
    assert CompressionReport(**json.loads(json.dumps(report.to_dict()))) == report
