"""Cross-entropy and distillation loss of every token, in chunks that are computed again for the gradient.

n tokens, V vocabulary (or classes), k stored logits of a cached teacher, T temperature.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # target of a token that is not predicted
CHUNK_ELEMENTS = 2**24  # numbers of a chunk in float32: 64 MB, and a few temporary tensors of that size


@dataclass(frozen=True, eq=False)
class TopKDistribution:
    """A teacher's distribution with its k likeliest tokens one by one and all others in one bucket.

    Raises:
        ValueError: `log_prob` is not one column wider than `index`.
    """

    index: Tensor  # (n, k) integers in [0, V), no token twice in a row
    log_prob: Tensor  # (n, k + 1) float: log-probabilities of these tokens, then of all others together

    def __post_init__(self) -> None:
        expected = (*self.index.shape[:-1], self.index.shape[-1] + 1)
        if tuple(self.log_prob.shape) != expected:
            raise ValueError(
                f"log_prob has shape {tuple(self.log_prob.shape)}, expected {expected} beside index "
                f"{tuple(self.index.shape)}. Its last column is the mass of all other tokens."
            )

    def flatten(self) -> "TopKDistribution":
        """The same with all leading dimensions as one."""
        return TopKDistribution(self.index.flatten(0, -2), self.log_prob.flatten(0, -2))


def token_losses(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | TopKDistribution | None = None,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Loss against the target and divergence from the teacher, for each token.

        cross_entropy = -log softmax(z)[y]
        kl            = sum_v p_v (log p_v - log q_v),  p = softmax(z_teacher / T),  q = softmax(z / T)

    (Hinton et al., 2015, https://arxiv.org/abs/1503.02531; without the factor T^2, which belongs to the weight of the
    term.) For a `TopKDistribution` v runs over its k tokens and one bucket with all others, whose q is the student's
    own mass of them. Merging outcomes never raises a divergence, so that is a lower bound of the full one, and equal
    to it for k = V. What the teacher rules out (p = 0) adds nothing, also where the student rules it out too.

    Numbers are float32 (float64 for float64 logits) one chunk of tokens at a time, in the forward and once more in
    the backward pass, which rounds the gradient once to the dtype of the logits. Nothing of size (n, V) is kept
    besides the logits themselves.

    Args:
        logits: The student's, (n, V), any floating dtype.
        targets: (n,) int64; `IGNORED` marks tokens that are not predicted, whatever their logits hold.
        teacher: Logits (n, V), or a distribution of n rows; on any device, never differentiated.
        temperature: T, also that of a `TopKDistribution`.
        chunk_tokens: Tokens in a chunk; None bounds a chunk to `CHUNK_ELEMENTS`. It changes no result.

    Returns:
        Cross-entropy and KL, (n,) each in the dtype of the computation, 0 at ignored tokens; KL is None without a
        teacher.

    Raises:
        ValueError: Shapes that do not fit together.
    """
    _check_shapes(logits, targets, teacher)
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // logits.shape[-1])
    targets = targets.to(logits.device)
    if isinstance(teacher, TopKDistribution):
        stored = (None, teacher.index, teacher.log_prob)
    else:
        stored = (None if teacher is None else teacher.detach(), None, None)
    cross_entropy, kl = _TokenLosses.apply(logits, targets, *stored, temperature, chunk)
    return cross_entropy, None if teacher is None else kl


def _check_shapes(logits: Tensor, targets: Tensor, teacher: Tensor | TopKDistribution | None) -> None:
    if logits.dim() != 2 or tuple(targets.shape) != tuple(logits.shape[:1]):
        raise ValueError(
            f"logits must be (n, V) beside targets (n,), got {tuple(logits.shape)} and {tuple(targets.shape)}. "
            "Flatten rows and tokens first."
        )
    if isinstance(teacher, Tensor) and teacher.shape != logits.shape:
        raise ValueError(
            f"The teacher's logits have shape {tuple(teacher.shape)}, the student's {tuple(logits.shape)}. "
            "Distil from a model with the same vocabulary (or classes) on the same tokens."
        )
    if isinstance(teacher, TopKDistribution) and teacher.index.shape[0] != logits.shape[0]:
        raise ValueError(
            f"The teacher has {teacher.index.shape[0]} tokens, the student {logits.shape[0]}. "
            "Give both the same batch."
        )


class _TokenLosses(torch.autograd.Function):
    """`token_losses` with the gradient written down."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        teacher_logits: Tensor | None,
        index: Tensor | None,
        log_prob: Tensor | None,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, targets, teacher_logits, index, log_prob)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        dtype = _wide(logits)
        cross_entropy = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
        kl = torch.zeros_like(cross_entropy)
        for part in _chunks(logits.shape[0], chunk):
            z, target = logits[part].to(dtype), targets[part]
            chosen = z.gather(-1, target.clamp(min=0)[:, None]).squeeze(-1)
            cross_entropy[part] = z.logsumexp(-1) - chosen
            if teacher_logits is not None:
                kl[part] = _full_kl(z / temperature, teacher_logits[part].to(z) / temperature)
            elif index is not None:
                kl[part] = _top_k_kl(z / temperature, index[part].to(z.device).long(), log_prob[part].to(z))
        ignored = targets == IGNORED
        return cross_entropy.masked_fill_(ignored, 0), kl.masked_fill_(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_cross_entropy: Tensor | None, d_kl: Tensor | None) -> tuple:
        logits, targets, teacher_logits, index, log_prob = ctx.saved_tensors
        temperature, dtype = ctx.temperature, _wide(logits)
        has_teacher = teacher_logits is not None or index is not None
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for part in _chunks(logits.shape[0], ctx.chunk):
            z, target = logits[part].to(dtype), targets[part]
            d_z = torch.zeros_like(z)
            if d_cross_entropy is not None:
                d_z = torch.softmax(z, -1)
                d_z.scatter_add_(-1, target.clamp(min=0)[:, None], d_z.new_full((len(z), 1), -1.0))
                d_z *= d_cross_entropy[part, None]
            if d_kl is not None and has_teacher:
                q = torch.softmax(z / temperature, -1)
                if teacher_logits is not None:
                    p = torch.softmax(teacher_logits[part].to(z) / temperature, -1)
                else:
                    p = _completed(z / temperature, q, index[part].to(z.device).long(), log_prob[part].to(z))
                d_z += (q - p) * (d_kl[part, None] / temperature)
            gradient[part] = d_z.masked_fill_((target == IGNORED)[:, None], 0)
        return gradient, None, None, None, None, None, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    # The difference of two -inf would be NaN.
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def _full_kl(u: Tensor, teacher: Tensor) -> Tensor:
    return _divergence(torch.log_softmax(teacher, -1), torch.log_softmax(u, -1))


def _log_rest(u: Tensor, index: Tensor) -> Tensor:
    """Log of the sum of exp(u) outside of `index`, (n, 1); -inf where nothing is outside."""
    return u.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)


def _top_k_kl(u: Tensor, index: Tensor, log_p: Tensor) -> Tensor:
    buckets = torch.cat([u.gather(-1, index), _log_rest(u, index)], dim=-1)
    return _divergence(log_p, buckets - u.logsumexp(-1, keepdim=True))


def _completed(u: Tensor, q: Tensor, index: Tensor, log_p: Tensor) -> Tensor:
    """The distribution (n, V) with the teacher's k probabilities, and its rest shared out as the student does."""
    log_share = log_p[:, -1:] - (_log_rest(u, index) - u.logsumexp(-1, keepdim=True))
    rest = torch.where(log_p[:, -1:] > -torch.inf, q * log_share.exp(), 0)
    return rest.scatter(-1, index, log_p[:, :-1].exp())
