"""LowRankSparse and PackedExperts: what they hold, what they refuse, and the experts that they stand for."""

import pytest
import torch

from hf_mcsmoe.expert_values import LowRankSparse, PackedExperts
from hf_mcsmoe.types import ExpertWeights


def factors(rows=(1, 3), dtype=torch.float32):
    torch.manual_seed(0)
    left, right, sparse = torch.randn(5, 2), torch.randn(2, 7), torch.randn(len(rows), 7)
    return LowRankSparse(left.to(dtype), right.to(dtype), torch.tensor(rows, dtype=torch.int64), sparse.to(dtype))


def packed(widths=(2, 0, 3), hidden=4, has_gate=True, has_bias=True):
    torch.manual_seed(0)
    total = sum(widths)
    offsets = torch.tensor([sum(widths[:place]) for place in range(len(widths) + 1)])
    tensors = {"up": torch.randn(total, hidden), "down": torch.randn(total, hidden)}
    if has_gate:
        tensors["gate"] = torch.randn(total, hidden)
    if has_bias:
        tensors |= {"up_bias": torch.randn(total), "down_bias": torch.randn(len(widths), hidden)}
        if has_gate:
            tensors["gate_bias"] = torch.randn(total)
    return PackedExperts(offsets, **tensors)


def expert_output(weights, expert, hidden):
    """One gated expert written out, neuron by neuron."""
    output = weights.down_bias[expert].clone()
    for neuron in range(weights.width):
        gate = weights.gate[expert, neuron] @ hidden + weights.gate_bias[expert, neuron]
        up = weights.up[expert, neuron] @ hidden + weights.up_bias[expert, neuron]
        output += weights.down[expert, :, neuron] * up * gate.sigmoid() * gate
    return output


def test_dense_is_the_sum_row_by_row():
    value = factors()
    expected = torch.zeros(5, 7)
    for row in range(5):
        for column in range(7):
            expected[row, column] = sum(value.left[row, r] * value.right[r, column] for r in range(2))
    expected[1] += value.sparse[0]
    expected[3] += value.sparse[1]
    torch.testing.assert_close(value.dense(), expected)
    assert value.shape == (5, 7) and value.rank == 2
    assert factors(rows=()).dense().shape == (5, 7)


def test_half_precision_is_rounded_once():
    value = factors(dtype=torch.bfloat16)
    exact = value.left.double() @ value.right.double()
    exact[value.rows] += value.sparse.double()
    assert torch.equal(value.dense(), exact.float().bfloat16())


@pytest.mark.parametrize("rows", [(3, 1), (1, 1), (-1, 2), (0, 5)])
def test_rows_ascend_within_the_matrix(rows):
    with pytest.raises(ValueError, match=r"rows must ascend within 0\.\.4"):
        factors(rows)


def test_factors_that_do_not_fit_are_refused():
    value = factors()
    with pytest.raises(ValueError, match="left of LowRankSparse"):
        LowRankSparse(value.left[:, :1], value.right, value.rows, value.sparse)
    with pytest.raises(ValueError, match="sparse of LowRankSparse"):
        LowRankSparse(value.left, value.right, value.rows, value.sparse[:, :3])
    with pytest.raises(ValueError, match="rows of LowRankSparse"):
        LowRankSparse(value.left, value.right, value.rows[:1], value.sparse)
    with pytest.raises(ValueError, match="int64"):
        LowRankSparse(value.left, value.right, value.rows.int(), value.sparse)


def test_packed_experts_say_their_sizes():
    value = packed()
    assert (value.num_experts, value.num_neurons, value.widths.tolist()) == (3, 5, [2, 0, 3])
    assert value.expert_of_neuron.tolist() == [0, 0, 2, 2, 2]
    assert value.expert(1).width == 0
    third = value.expert(2)
    assert torch.equal(third.up[0], value.up[2:]) and torch.equal(third.down[0].T, value.down[2:])
    assert torch.equal(third.down_bias[0], value.down_bias[2]) and torch.equal(third.gate_bias[0], value.gate_bias[2:])
    third.up.zero_()
    assert not value.up[2:].any() and value.up[:2].all()


def test_packing_and_filling_up_are_inverse():
    torch.manual_seed(0)
    for has_gate in (True, False):
        gate = {"gate": torch.randn(3, 4, 6), "gate_bias": torch.randn(3, 4)} if has_gate else {}
        weights = ExpertWeights(
            up=torch.randn(3, 4, 6),
            down=torch.randn(3, 6, 4),
            up_bias=torch.randn(3, 4),
            down_bias=torch.randn(3, 6),
            **gate,
        )
        again = PackedExperts.from_dense(weights).to_uniform(4)
        assert again.tensors().keys() == weights.tensors().keys()
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in weights.tensors().items())


def test_filling_up_keeps_the_functions():
    value, hidden = packed(), torch.randn(4)
    uniform = value.to_uniform(8)
    assert uniform.up.shape == (3, 8, 4) and not uniform.down[:, :, 3:].any()
    for expert in range(3):
        alone = value.expert(expert)
        torch.testing.assert_close(expert_output(uniform, expert, hidden), expert_output(alone, 0, hidden))
    with pytest.raises(ValueError, match=r"expert 2 has 3 neurons\. Use at least 3"):
        value.to_uniform(2)


def test_selected_neurons_stay_with_their_experts():
    value = packed((2, 0, 3, 1))
    chosen = value.select_neurons(torch.tensor([1, 3, 4]))
    assert chosen.offsets.tolist() == [0, 1, 1, 3, 3]
    assert torch.equal(chosen.gate, value.gate[[1, 3, 4]]) and torch.equal(chosen.up_bias, value.up_bias[[1, 3, 4]])
    assert torch.equal(chosen.down_bias, value.down_bias)
    assert value.select_neurons(torch.zeros(0, dtype=torch.int64)).widths.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("index", [[1, 0], [2, 2], [-1, 3], [0, 6]])
def test_selection_must_ascend(index):
    with pytest.raises(ValueError, match=r"ascend within 0\.\.5"):
        packed((2, 0, 3, 1)).select_neurons(torch.tensor(index))


@pytest.mark.parametrize("offsets", [[0, 3, 2, 5], [0, 2, 2, 4], [1, 2, 2, 5]])
def test_offsets_cover_all_neurons(offsets):
    value = packed()
    with pytest.raises(ValueError, match="from 0 to 5"):
        PackedExperts(torch.tensor(offsets), up=value.up, down=value.down)


def test_packed_tensors_that_do_not_fit_are_refused():
    value = packed()
    with pytest.raises(ValueError, match="down of PackedExperts"):
        PackedExperts(value.offsets, up=value.up, down=value.down.T)
    with pytest.raises(ValueError, match="down_bias of PackedExperts"):
        PackedExperts(value.offsets, up=value.up, down=value.down, down_bias=value.down)
    with pytest.raises(ValueError, match="int64"):
        PackedExperts(value.offsets.int(), up=value.up, down=value.down)
