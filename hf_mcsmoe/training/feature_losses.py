"""Optional terms of distillation: hidden states and router distributions. B rows, S tokens, D hidden, N slots."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def relative_squared_error(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Weight times |h_student - h_teacher|^2 / |h_teacher|^2 of each token.

    Relative to each token's own energy, so that no layer and no token of huge norm (attention sinks) decides the
    term. Deviation from MC-SMoE (https://arxiv.org/abs/2310.01334), whose code takes the logarithm of the mean squared
    error of all states: that is no sum over tokens, so accumulated batches would not equal one large batch, and its
    gradient grows without bound as the states become equal.

    Args:
        student: (B, S, D), any floating dtype.
        teacher: (B, S, D) on any device; never differentiated.
        weights: (B, S); a token of weight 0 does not count, whatever its states hold.

    Returns:
        (B, S) float32. A token whose teacher state is all zero counts with its plain squared error.

    Raises:
        ValueError: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's hidden states have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}. "
            "Use hidden_state_weight=0 for models of different sizes."
        )
    weights = weights.to(student.device)
    counts = (weights > 0)[..., None]
    target = torch.where(counts, teacher.detach().to(student.device, torch.float32), 0)
    error = (torch.where(counts, student.float(), 0) - target).square().sum(-1)
    energy = target.square().sum(-1)
    return weights * error / torch.where(energy > 0, energy, 1)


def router_divergence(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Weight times KL(softmax(teacher) || softmax(student)) of each token's router logits in one layer.

    The softmax over all N slots is taken whatever the model makes of its logits (sigmoid scores, top-k
    renormalisation): it orders the slots as every router does and has no ties that a top-k would break.

    Args:
        student: (T, N), any floating dtype.
        teacher: (T, N) on any device; never differentiated.
        weights: (B, S) with B S = T; a token of weight 0 does not count, whatever its logits hold.

    Returns:
        (B, S) float32.

    Raises:
        ValueError: The shapes differ.
    """
    if student.shape != teacher.shape or student.shape[0] != weights.numel():
        raise ValueError(
            f"The student's router logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}, "
            f"for {weights.numel()} tokens. Use router_weight=0 for models that route differently."
        )
    weights = weights.to(student.device)
    counts = (weights > 0).flatten()[:, None]
    log_q = torch.log_softmax(torch.where(counts, student.float(), 0), -1)
    log_p = torch.log_softmax(torch.where(counts, teacher.detach().to(student.device, torch.float32), 0), -1)
    return weights * (log_p.exp() * (log_p - log_q)).sum(-1).reshape(weights.shape)


def hidden_state_sums(student: Any, teacher: Any, weights: Tensor, encoder_weights: Tensor) -> Tensor:
    """`relative_squared_error` summed over the tokens of each row, mean over all layers after the embeddings.

    Args:
        student: Output of the model with its hidden states.
        teacher: That of the teacher.
        weights: (B, S) of the tokens of the decoder, or of the only stack of layers.
        encoder_weights: (B, S of the encoder).

    Returns:
        (B,) float32.

    Raises:
        ValueError: No hidden states, other numbers of layers, or other sizes.
    """
    streams = {"hidden_states": weights, "decoder_hidden_states": weights, "encoder_hidden_states": encoder_weights}
    rows = []
    for name, token_weights in streams.items():
        states, target = getattr(student, name, None) or (), getattr(teacher, name, None) or ()
        if len(states) != len(target):
            raise ValueError(
                f"The student has {len(states)} {name}, the teacher {len(target)}. Use hidden_state_weight=0 for "
                "models of different depth."
            )
        for h, h_teacher in zip(states[1:], target[1:], strict=True):
            rows.append(relative_squared_error(h, h_teacher, token_weights).sum(-1).to(weights.device))
    if not rows:
        raise ValueError(f"{type(student).__name__} has no hidden states. Use hidden_state_weight=0 for this model.")
    return torch.stack(rows).mean(0)


def router_sums(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """`router_divergence` summed over the tokens of each row, mean over layers.

    Args:
        student: Router logits of each layer, (T, N).
        teacher: Those of the same layers of the teacher.
        weights: (B, S) of the tokens that each layer sees.

    Returns:
        (B,) float32.

    Raises:
        ValueError: A layer's router was not asked in this batch, or shapes differ.
    """
    if not len(student) == len(teacher) == len(weights):
        raise ValueError(
            f"{len(student)} routers of the student and {len(teacher)} of the teacher worked, but there are "
            f"{len(weights)}. Use router_weight=0 for models that leave layers out."
        )
    layers = zip(student, teacher, weights, strict=True)
    rows = [router_divergence(one, other, weight).sum(-1) for one, other, weight in layers]
    return torch.stack([row.to(rows[0].device) for row in rows]).mean(0)
