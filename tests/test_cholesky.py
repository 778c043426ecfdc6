"""Cholesky factors in blocks, against torch's own."""

import pytest
import torch

from hf_mcsmoe.solvers import cholesky
from hf_mcsmoe.solvers.cholesky import cholesky_in_place


def positive(size, seed=0):
    rows = torch.randn(size + 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows


@pytest.mark.parametrize("size", [0, 1, 4, 5, 11, 12])
def test_blocks_give_the_factor(size, monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 4)
    matrix = positive(size)
    factor = matrix + torch.ones(size, size, dtype=torch.float64).triu(1)  # the upper triangle is not read
    assert cholesky_in_place(factor)
    torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(matrix), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("place", [0, 5, 10])
def test_what_is_not_positive_definite_has_none(place, monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 4)
    matrix = positive(11)
    matrix[place, place] = -1.0
    assert not cholesky_in_place(matrix)
    singular = positive(11)
    singular[:, place], singular[place] = float("nan"), float("nan")
    assert not cholesky_in_place(singular)


def test_it_is_solved_with_like_any_factor():
    matrix, right = positive(300), torch.randn(300, 7, dtype=torch.float64)
    factor = matrix.clone()
    assert cholesky_in_place(factor)
    torch.testing.assert_close(matrix @ torch.cholesky_solve(right, factor), right, rtol=1e-6, atol=1e-6)
