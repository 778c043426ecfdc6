import itertools

import pytest
import torch

from hf_mcsmoe.decomposition import DECOMPOSITION
from hf_mcsmoe.solvers.low_rank import input_metric, num_kept_rows, resolve_rank

plain = DECOMPOSITION["low_rank_sparse"]
whitened = DECOMPOSITION["whitened_low_rank_sparse"]
SHAPES = [(12, 7), (7, 12), (9, 9)]
SHAPE_NAMES = ["tall", "wide", "square"]

KEEPING_ROWS = [name for name in DECOMPOSITION if "keep_rows" in DECOMPOSITION.options(name)]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=SHAPES, ids=SHAPE_NAMES)
def matrix(request, generator):
    return torch.randn(*request.param, generator=generator)


def inputs_for(matrix, generator, num_tokens=40, num_directions=None):
    """Calibration inputs (T, I) with very different scales, in a subspace of `num_directions`."""
    columns = matrix.shape[1]
    inputs = torch.randn(num_tokens, columns, generator=generator) * torch.logspace(-2, 1, columns)
    mixing = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0][: num_directions or columns]
    return (inputs @ mixing.T @ mixing).double()


def output_error(matrix, result, inputs):
    return (inputs @ (matrix.double() - result.dense().double()).T).square().sum().item()


def plain_error(matrix, result):
    return (matrix.double() - result.dense().double()).square().sum().item()


def tail(matrix, rank):
    """Sum of the squares of all singular values but the `rank` largest: what Eckart and Young allow."""
    return torch.linalg.svdvals(matrix.double())[rank:].square().sum().item()


# What the paper's initialisation is


def test_factors_are_those_of_the_paper(matrix):
    u, values, v = torch.linalg.svd(matrix.double())
    result = plain(matrix, rank=3, keep_rows=1.0)
    for place in range(3):
        sign = torch.sign(result.left[:, place].double() @ u[:, place])
        torch.testing.assert_close(result.left[:, place].double(), sign * values[place].sqrt() * u[:, place])
        torch.testing.assert_close(result.right[place].double(), sign * values[place].sqrt() * v[place])


def test_all_rows_kept_is_the_matrix(matrix):
    result = plain(matrix, rank=3, keep_rows=1.0)
    assert result.rows.tolist() == list(range(len(matrix)))
    torch.testing.assert_close(result.dense(), matrix, rtol=0, atol=3e-7)


def test_kept_rows_are_those_with_the_largest_error(matrix):
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    residual = matrix.double() - (u[:, :2] * values[:2]) @ v[:2]
    errors = [sum(x**2 for x in row) for row in residual.tolist()]
    count = num_kept_rows(0.3, len(matrix))
    expected = sorted(sorted(range(len(matrix)), key=lambda row: (-errors[row], row))[:count])
    result = plain(matrix, rank=2, keep_rows=0.3)
    assert result.rows.tolist() == expected
    torch.testing.assert_close(result.dense()[expected], matrix[expected])
    torch.testing.assert_close(result.sparse.double(), residual[expected], rtol=1e-5, atol=1e-6)


def test_ties_break_by_index():
    # The best rank 1 is the first row alone; the others miss by 1 each.
    matrix = torch.tensor([[3.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert plain(matrix, rank=1, keep_rows=0.5).rows.tolist() == [1, 2]


def test_scores_choose_the_rows(matrix):
    scores = torch.zeros(len(matrix))
    scores[4], scores[1] = 2.0, 1.0
    for name in KEEPING_ROWS:
        gram = torch.eye(matrix.shape[1])
        result = DECOMPOSITION[name](matrix, gram, scores, rank=2, keep_rows=2 / len(matrix))
        assert result.rows.tolist() == [1, 4]


@pytest.mark.parametrize("name", KEEPING_ROWS)
def test_no_rows_are_kept(name, matrix):
    result = DECOMPOSITION[name](matrix, torch.eye(matrix.shape[1]), rank=2, keep_rows=0)
    assert result.sparse.shape == (0, matrix.shape[1]) and result.rows.dtype == torch.int64
    assert plain_error(matrix, result) == pytest.approx(tail(matrix, 2), rel=1e-5)


# The metric of the inputs


def test_metric_is_a_factor_of_the_gram(generator):
    inputs = torch.randn(5, 8, generator=generator).double()
    gram = inputs.T @ inputs
    metric = input_metric(gram)
    assert metric.shape == (8, 5)
    torch.testing.assert_close(metric @ metric.T, gram)


def test_metric_of_a_definite_gram_is_its_cholesky_factor_but_not_where_pivots_are_rounding(generator):
    inputs = torch.randn(20, 8, generator=generator).double()
    metric = input_metric(inputs.T @ inputs)
    assert metric.shape == (8, 8) and torch.equal(metric, metric.tril())
    torch.testing.assert_close(metric @ metric.T, inputs.T @ inputs)
    inputs[:, 7] = inputs[:, :7].sum(1)
    gram = inputs.T @ inputs
    for rounding in (0.0, 1e-13):  # with the second one the Gram has a factor
        gram.diagonal().add_(rounding)
        assert input_metric(gram).shape == (8, 7)


def test_identity_gram_gives_the_plain_svd(matrix):
    gram = torch.eye(matrix.shape[1]).double()
    for keep_rows in (0, 0.3, 1.0):
        mine = whitened(matrix, gram, rank=3, keep_rows=keep_rows, alternations=2)
        reference = plain(matrix, rank=3, keep_rows=keep_rows, alternations=2)
        assert torch.equal(mine.rows, reference.rows)
        torch.testing.assert_close(mine.dense(), reference.dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_output_error_is_the_least_possible(matrix, rank, generator):
    inputs = inputs_for(matrix, generator)
    result = whitened(matrix, inputs.T @ inputs, rank=rank, keep_rows=0)
    least = tail(inputs @ matrix.double().T, rank)
    scale = (inputs @ matrix.double().T).square().sum().item()
    assert output_error(matrix, result, inputs) == pytest.approx(least, rel=1e-4, abs=1e-12 * scale)
    reference = plain(matrix, rank=rank, keep_rows=0)
    assert output_error(matrix, result, inputs) < 0.9 * output_error(matrix, reference, inputs)


@pytest.mark.parametrize("rank", [2, 3, 7])
def test_singular_gram(matrix, rank, generator):
    inputs = inputs_for(matrix, generator, num_directions=3)
    result = whitened(matrix, inputs.T @ inputs, rank=rank, keep_rows=0)
    scale = (inputs @ matrix.double().T).square().sum().item()
    least = tail(inputs @ matrix.double().T, rank)
    assert output_error(matrix, result, inputs) == pytest.approx(least, rel=1e-4, abs=1e-12 * scale)
    if rank >= 3:
        # Rank that the inputs do not need is not wasted: it is the plain SVD of what they leave.
        u = torch.linalg.svd(matrix.double() @ inputs.T)[0][:, :3]
        rest = matrix.double() - u @ u.T @ matrix.double()
        assert plain_error(matrix, result) == pytest.approx(tail(rest, rank - 3), rel=1e-4, abs=1e-11)


def test_rows_without_inputs_are_treated_as_in_the_plain_norm(matrix):
    gram = torch.zeros(matrix.shape[1], matrix.shape[1])
    mine = whitened(matrix, gram, rank=2, keep_rows=0.3, alternations=0)
    reference = plain(matrix, rank=2, keep_rows=0.3)
    assert torch.equal(mine.rows, reference.rows)
    torch.testing.assert_close(mine.dense(), reference.dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_directions", [0, 3, None], ids=["zero", "singular", "regular"])
@pytest.mark.parametrize("keep_rows", [0, 0.3, 1.0])
@pytest.mark.parametrize("alternations", [0, 3])
def test_full_rank_is_the_matrix(matrix, num_directions, keep_rows, alternations, generator):
    inputs = inputs_for(matrix, generator, num_directions=num_directions)
    inputs = inputs * (num_directions != 0)
    result = whitened(
        matrix, inputs.T @ inputs, rank=min(matrix.shape), keep_rows=keep_rows, alternations=alternations
    )
    torch.testing.assert_close(result.dense(), matrix, rtol=0, atol=2e-6)


def test_kept_rows_are_those_with_the_largest_output_error(matrix, generator):
    inputs = inputs_for(matrix, generator)
    gram = inputs.T @ inputs
    u = torch.linalg.svd(matrix.double() @ inputs.T)[0][:, :2]
    residual = matrix.double() - u @ u.T @ matrix.double()
    errors = [float(row @ gram @ row) for row in residual]
    count = num_kept_rows(0.3, len(matrix))
    expected = sorted(sorted(range(len(matrix)), key=lambda row: -errors[row])[:count])
    assert whitened(matrix, gram, rank=2, keep_rows=0.3, alternations=0).rows.tolist() == expected


def test_rows_that_are_exact_for_the_inputs_tie(matrix, generator):
    inputs = inputs_for(matrix, generator, num_directions=2)
    result = whitened(matrix, inputs.T @ inputs, rank=3, keep_rows=0.3, alternations=0)
    everything = whitened(matrix, inputs.T @ inputs, rank=3, keep_rows=0)
    errors = (matrix - everything.dense()).square().sum(1)
    assert set(result.rows.tolist()) == set(errors.topk(len(result.rows)).indices.tolist())


def test_fitting_few_rows_keeps_them_exact_for_the_inputs(generator):
    # 2 of 5 rows are not kept; the two products of the inputs with them need all of rank 2.
    matrix = torch.randn(5, 6, generator=generator)
    inputs = inputs_for(matrix, generator, num_directions=3)
    scale = (inputs @ matrix.double().T).square().sum().item()
    for rank in (2, 3):
        result = whitened(matrix, inputs.T @ inputs, rank=rank, keep_rows=0.6)
        assert output_error(matrix, result, inputs) < 1e-12 * scale


def best_of_all_rows(matrix, inputs, rank, count):
    """The least output error of any choice of rows with the best factors for the others."""
    outputs = inputs @ matrix.double().T  # (T, O)
    choices = itertools.combinations(range(len(matrix)), len(matrix) - count)
    return min(tail(outputs[:, list(rest)], rank) for rest in choices)


def test_alternating_only_lowers_the_error_towards_the_joint_optimum(generator):
    excess = []
    for _ in range(20):
        matrix = torch.randn(6, 5, generator=generator)
        inputs = inputs_for(matrix, generator)
        gram, least = inputs.T @ inputs, best_of_all_rows(matrix, inputs, 2, 2)
        errors = [
            output_error(matrix, whitened(matrix, gram, rank=2, keep_rows=2 / 6, alternations=n), inputs)
            for n in (0, 1, 2, 8)
        ]
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))
        assert errors[-1] >= least * (1 - 1e-4)
        excess.append((errors[0] / least, errors[-1] / least))
    before, after = torch.tensor(excess).log().mean(0).exp().tolist()
    assert after < before / 2 and sum(end < 1 + 1e-4 for _, end in excess) >= 5


def test_alternating_is_best_for_the_rows_it_ends_with(matrix, generator):
    inputs = inputs_for(matrix, generator)
    result = whitened(matrix, inputs.T @ inputs, rank=2, keep_rows=0.3)
    rest = [row for row in range(len(matrix)) if row not in result.rows.tolist()]
    least = tail((inputs @ matrix.double().T)[:, rest], 2)
    assert output_error(matrix, result, inputs) == pytest.approx(least, rel=1e-4)


# Sizes, dtypes, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_sparse_rows_once(dtype, generator):
    matrix = torch.randn(16, 12, generator=generator).to(dtype)
    result = plain(matrix, rank=3, keep_rows=1.0)
    assert {tensor.dtype for tensor in (result.left, result.right, result.sparse)} == {dtype}
    product = result.left.double() @ result.right.double()
    assert torch.equal(result.sparse, (matrix.double() - product).to(dtype))
    eps = torch.finfo(dtype).eps
    assert ((product + result.sparse.double() - matrix.double()).abs() <= eps / 2 * result.sparse.abs()).all()


def test_same_input_gives_the_same_bits(matrix, generator):
    inputs = inputs_for(matrix, generator)
    first, second = (whitened(matrix, inputs.T @ inputs, rank=3) for _ in range(2))
    assert torch.equal(first.left, second.left) and torch.equal(first.sparse, second.sparse)


def test_matrix_of_zeros():
    result = plain(torch.zeros(6, 4), rank=2, keep_rows=0.5)
    assert result.left.shape == (6, 2) and result.right.shape == (2, 4) and result.rows.tolist() == [0, 1, 2]
    assert not result.dense().any()


@pytest.mark.parametrize(("ratio", "rank"), [(0.05208, 32), (0.0521, 33), (1.0, 615), (1e-9, 1)])
def test_rank_of_a_parameter_ratio(ratio, rank):
    # ceil(ratio * 768 * 3072 / 3840), and 768 * 3072 / 3840 = 614.4
    assert resolve_rank((768, 3072), parameter_ratio=ratio) == rank
    assert resolve_rank((3072, 768), parameter_ratio=ratio) == rank


def test_rank_is_the_papers_by_default():
    assert resolve_rank((768, 3072)) == 32


@pytest.mark.parametrize(("share", "rows"), [(0, 0), (0.1, 1), (0.05, 1), (0.04, 0), (0.25, 3), (1, 10)])
def test_number_of_kept_rows(share, rows):
    assert num_kept_rows(share, 10) == rows


ERRORS = {
    "both": ({"rank": 2, "parameter_ratio": 0.5}, "rank is 2 and parameter_ratio is 0.5; they say the same"),
    "rank above": ({"rank": 5}, r"rank is 5, it must be a whole number from 1 to 4 for a matrix \(6, 4\)"),
    "default rank": ({}, "rank is 32, it must be a whole number from 1 to 4"),
    "rank 0": ({"rank": 0}, "rank is 0, it must be"),
    "rank 2.0": ({"rank": 2.0}, "rank is 2.0, it must be"),
    "ratio": ({"parameter_ratio": 1.5}, r"parameter_ratio is 1.5, it must be in \(0, 1\]"),
    "rows": ({"rank": 2, "keep_rows": 1.1}, r"keep_rows is 1.1, it must be in \[0, 1\]"),
    "negative rows": ({"rank": 2, "keep_rows": -0.1}, r"keep_rows is -0.1, it must be in \[0, 1\]"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("name", KEEPING_ROWS)
def test_what_cannot_be_is_refused(name, case):
    options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        DECOMPOSITION[name](torch.ones(6, 4), torch.eye(4), **options)


@pytest.mark.parametrize("gram", [None, torch.eye(6)], ids=["none", "wrong side"])
def test_whitening_needs_the_gram_of_the_inputs(gram):
    with pytest.raises(ValueError, match=r"input_gram has shape .*it must be \(4, 4\).*low_rank_sparse"):
        whitened(torch.ones(6, 4), gram, rank=2)
