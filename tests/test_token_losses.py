import math

import pytest
import torch

from hf_mcsmoe.training.cache_writer import top_k_distribution
from hf_mcsmoe.training.feature_losses import relative_squared_error, router_divergence
from hf_mcsmoe.training.token_losses import IGNORED, TopKDistribution, token_losses

NUM_TOKENS, VOCAB = 7, 11


@pytest.fixture
def problem():
    """Student and teacher logits (7, 11) in float64, and targets of which two are ignored."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(NUM_TOKENS, VOCAB, dtype=torch.float64, generator=generator) for _ in range(2))
    targets = torch.tensor([4, IGNORED, 0, 10, 3, IGNORED, 10])
    return student, teacher, targets


def reference(student, teacher, targets, temperature, kept=None):
    """Both losses of each token by loops over the definition; `kept`: tokens that are outcomes of their own."""
    cross_entropy, kl = [], []
    kept = kept or [range(VOCAB)] * len(student)
    for z, z_teacher, target, own in zip(student, teacher, targets.tolist(), kept, strict=True):
        q1 = [math.exp(x) / sum(math.exp(y) for y in z) for x in z]
        q, p = ([math.exp(x / temperature) for x in values] for values in (z, z_teacher))
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        outcomes = [(p[v], q[v]) for v in own]
        others = [v for v in range(VOCAB) if v not in own]
        if others:
            outcomes.append((sum(p[v] for v in others), sum(q[v] for v in others)))
        is_target = target != IGNORED
        cross_entropy.append(-math.log(q1[target]) if is_target else 0.0)
        kl.append(sum(a * math.log(a / b) for a, b in outcomes) if is_target else 0.0)
    return torch.tensor(cross_entropy, dtype=torch.float64), torch.tensor(kl, dtype=torch.float64)


def naive_gradient(student, teacher, targets, temperature, weights, index=None):
    """The gradient that autograd gives for the textbook formula on the whole matrix."""
    z = student.clone().requires_grad_()
    log_q, p = torch.log_softmax(z / temperature, -1), torch.softmax(teacher / temperature, -1)
    if index is None:
        kl = (p * (p.log() - log_q)).sum(-1)
    else:
        rest = torch.ones_like(p).scatter(-1, index, 0)
        p = torch.cat([p.gather(-1, index), (p * rest).sum(-1, keepdim=True)], -1)
        q = torch.cat([log_q.exp().gather(-1, index), (log_q.exp() * rest).sum(-1, keepdim=True)], -1)
        kl = (p * (p / q).log()).sum(-1)
    cross_entropy = torch.nn.functional.cross_entropy(z, targets, ignore_index=IGNORED, reduction="none")
    (weights[0] * cross_entropy + weights[1] * kl * (targets != IGNORED)).sum().backward()
    return z.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_losses_and_gradient_are_those_of_the_definition(problem, temperature, chunk):
    student, teacher, targets = problem
    z = student.clone().requires_grad_()
    cross_entropy, kl = token_losses(z, targets, teacher, temperature=temperature, chunk_tokens=chunk)
    expected = reference(student, teacher, targets, temperature)
    torch.testing.assert_close(torch.stack([cross_entropy, kl]), torch.stack(expected))
    weights = torch.arange(1.0, 1 + 2 * NUM_TOKENS, dtype=torch.float64).reshape(2, -1)  # tokens differ in weight
    (weights[0] * cross_entropy + weights[1] * kl).sum().backward()
    torch.testing.assert_close(z.grad, naive_gradient(student, teacher, targets, temperature, weights))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 4, VOCAB - 1])
def test_a_top_k_teacher_has_one_outcome_for_all_other_tokens(problem, top_k, temperature):
    student, teacher, targets = problem
    cached = top_k_distribution(teacher, top_k, temperature)
    largest = [[v for v in range(VOCAB) if (row > row[v]).sum() < top_k] for row in teacher]
    assert [sorted(row) for row in cached.index.tolist()] == largest
    assert torch.allclose(cached.log_prob.exp().sum(-1), torch.ones(NUM_TOKENS))
    z = student.clone().requires_grad_()
    _, kl = token_losses(z, targets, cached, temperature=temperature, chunk_tokens=2)
    _, expected = reference(student, teacher, targets, temperature, kept=largest)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-7)
    _, full = reference(student, teacher, targets, temperature)
    assert (kl <= full + 1e-6).all() and (kl >= 0).all()
    kl.sum().backward()
    weights = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    index = cached.index.long()
    torch.testing.assert_close(
        z.grad, naive_gradient(student, teacher, targets, temperature, weights, index), rtol=1e-5, atol=1e-7
    )


def test_a_top_k_teacher_with_all_tokens_is_the_teacher(problem):
    student, teacher, targets = problem
    gradients = []
    for source in (teacher, top_k_distribution(teacher, VOCAB, 2.0)):
        z = student.clone().requires_grad_()
        _, kl = token_losses(z, targets, source, temperature=2.0)
        kl.sum().backward()
        gradients.append((kl.detach(), z.grad))
    for live, cached in zip(*gradients, strict=True):
        torch.testing.assert_close(cached, live, rtol=1e-5, atol=1e-6)


def test_ignored_tokens_do_not_count_whatever_their_logits_hold(problem):
    student, teacher, targets = problem
    student[1], teacher[5] = torch.nan, torch.inf
    z = student.requires_grad_()
    cross_entropy, kl = token_losses(z, targets, teacher)
    (cross_entropy + kl).sum().backward()
    assert torch.isfinite(z.grad).all() and (z.grad[[1, 5]] == 0).all()
    assert (z.grad[[0, 2, 3, 4, 6]].abs().sum(-1) > 0).all()
    assert torch.isfinite(cross_entropy).all() and torch.isfinite(kl).all()


def test_what_the_teacher_rules_out_adds_nothing(problem):
    student, teacher, targets = problem
    teacher[:, 2], student[:, 2] = -torch.inf, -torch.inf
    targets = targets.masked_fill(targets == 2, 3)
    z = student.requires_grad_()
    _, kl = token_losses(z, targets, teacher)
    kl.sum().backward()
    kept = [v for v in range(VOCAB) if v != 2]
    without = token_losses(student.detach()[:, kept], targets.clamp(max=9), teacher[:, kept])[1]
    torch.testing.assert_close(kl, without)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_rounded_once(problem, dtype):
    student, teacher, targets = (t.to(dtype) if t.is_floating_point() else t for t in problem)
    z, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    for logits, source in ((z, teacher), (exact, teacher.double())):
        cross_entropy, kl = token_losses(logits, targets, source, temperature=2.0)
        (cross_entropy + 4 * kl).sum().backward()
    assert z.grad.dtype == dtype and cross_entropy.dtype == torch.float64
    difference = (z.grad.double() - exact.grad).abs()
    assert (difference <= torch.finfo(dtype).eps * exact.grad.abs() + 1e-6).all()


def test_nothing_of_full_size_is_kept_but_the_logits(problem):
    student, teacher, targets = problem
    z = student.bfloat16().requires_grad_()
    teacher = teacher.bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_losses(z, targets, teacher, temperature=2.0, chunk_tokens=2)
    large = {t.data_ptr() for t in kept if t.numel() >= NUM_TOKENS * VOCAB}
    assert large == {z.data_ptr(), teacher.data_ptr()}


def test_shapes_that_do_not_fit_are_refused(problem):
    student, teacher, targets = problem
    with pytest.raises(ValueError, match="same vocabulary"):
        token_losses(student, targets, teacher[:, :-1])
    with pytest.raises(ValueError, match="Flatten"):
        token_losses(student, targets[:-1], teacher)
    with pytest.raises(ValueError, match="same batch"):
        token_losses(student, targets, top_k_distribution(teacher[:3], 2, 1.0))
    with pytest.raises(ValueError, match="last column"):
        TopKDistribution(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3))


def test_hidden_states_are_compared_relative_to_each_tokens_energy():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0]])
    teacher[1, 2] = 0
    student[0, 2] = torch.nan
    student.requires_grad_()
    error = relative_squared_error(student, teacher, weights)
    for row in range(2):
        for place in range(3):
            difference = sum((student[row, place, d] - teacher[row, place, d]) ** 2 for d in range(4))
            energy = sum(teacher[row, place, d] ** 2 for d in range(4)) or 1.0
            expected = weights[row, place] * difference / energy if weights[row, place] else torch.tensor(0.0)
            torch.testing.assert_close(error[row, place], expected)
    error.sum().backward()
    assert torch.isfinite(student.grad).all() and (student.grad[0, 2] == 0).all()
    with pytest.raises(ValueError, match="hidden_state_weight=0"):
        relative_squared_error(student[..., :2], teacher, weights)


def test_routers_are_compared_by_their_softmax():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 5, generator=generator) for _ in range(2))
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0]])
    teacher[2] = torch.nan
    divergence = router_divergence(student, teacher, weights)
    for token, weight in enumerate(weights.flatten().tolist()):
        p, q = torch.softmax(teacher[token], -1), torch.softmax(student[token], -1)
        expected = weight * sum(p[n] * torch.log(p[n] / q[n]) for n in range(5)) if weight else torch.tensor(0.0)
        torch.testing.assert_close(divergence.flatten()[token], expected)
    with pytest.raises(ValueError, match="router_weight=0"):
        router_divergence(student, teacher, weights[:1])
