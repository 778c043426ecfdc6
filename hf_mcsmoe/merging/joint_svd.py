"""The weighted mean of a group's members, in the column space that they share."""

import torch
from torch import Tensor

from ..merging import MERGING
from ..observation.observed import sum_dtype
from ..option_checks import check_whole
from .weighted_average import merge_by_weighted_average

CHECK_RANK = check_whole("rank", 1, "None keeps the full rank.", or_none=True)


@MERGING.register("joint_svd", check=CHECK_RANK)
def merge_by_joint_svd(members: Tensor, importance: Tensor, *, rank: int | None = None) -> Tensor:
    """Average the right factors of a joint singular value decomposition of all members.

    Subspace expert merging of Sub-MoE (Li et al., 2025, https://arxiv.org/abs/2506.23266):

        [W_1 ... W_m] = U S [V_1 ... V_m]^T,    merged = U S (sum_i share_i V_i)^T

    At full rank this is sum_i share_i W_i, the weighted average itself, and is computed as such; with `rank` r it is
    the projection U_r U_r^T of that average onto the leading left singular vectors, which is what the products are
    computed from. The projection stores no fewer numbers: the result is a full matrix again. The paper's whitened
    variant has the same identity and is left out.

    Memory with a rank: 8 O^2 bytes. Time: O^2 m I + O^3.

    Args:
        members: (m, O, I) float32; row 0 is the dominant expert. A bias (I = 1) is averaged, not projected.
        importance: Not necessarily normalised, (m,), >= 0.
        rank: Singular vectors that stay; None, or more than there are, for all.

    Returns:
        The merged matrix, (O, I) float32. If all importances are zero the dominant expert counts alone.
    """
    mean = merge_by_weighted_average(members, importance)
    num_members, outputs, inputs = members.shape
    if rank is None or inputs == 1 or rank >= min(outputs, num_members * inputs):
        return mean
    wide = members.to(sum_dtype(members.device))
    gram = torch.einsum("moi,mpi->op", wide, wide)  # W W^T of the concatenation: its eigenvectors are U
    leading = torch.linalg.eigh(gram)[1][:, -rank:]
    return (leading @ (leading.T @ mean.to(gram.dtype))).float()
