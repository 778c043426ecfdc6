"""Similarity from the Gram matrix equals the cosine of logits that nobody stored."""

import pytest
import torch

from hf_mcsmoe.executors.accumulator import StatisticsAccumulator
from hf_mcsmoe.observation.observed import ObservedTokens
from hf_mcsmoe.similarity.router_logits import router_logit_similarity
from hf_mcsmoe.types import ExpertWeights, LayerStatistics

WEIGHTS = ExpertWeights(up=torch.zeros(5, 2, 3), down=torch.zeros(5, 3, 2))


def statistics_of(logits):
    logits = logits.double()
    counts = torch.ones(logits.shape[1], dtype=torch.int64)
    return LayerStatistics(num_tokens=len(logits), selection_count=counts, sums={"logit_gram": logits.T @ logits})


def cosine_of_columns(logits):
    columns = logits.double().T
    return torch.nn.functional.cosine_similarity(columns[:, None], columns[None], dim=-1)


@pytest.fixture
def logits():
    return torch.randn(23, 5, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0])


def test_similarity_is_the_cosine_of_the_logit_columns(logits):
    similarity = router_logit_similarity(statistics_of(logits), WEIGHTS)
    assert similarity.dtype == torch.float64
    torch.testing.assert_close(similarity, cosine_of_columns(logits))
    torch.testing.assert_close(similarity, similarity.T)
    assert similarity.diagonal().tolist() == [1.0] * 5


def test_similarity_of_streamed_batches_is_that_of_the_real_tokens(logits):
    mask = torch.arange(23) % 4 != 1
    accumulator = StatisticsAccumulator(5, frozenset({"logit_gram"}))
    index, gates = torch.zeros(23, 1, dtype=torch.int64), torch.ones(23, 1)
    for rows in torch.arange(23).split(7):
        states = torch.zeros(len(rows), 3)
        accumulator.update(ObservedTokens(5, states, index[rows], gates[rows], mask[rows], logits[rows]))
    similarity = router_logit_similarity(accumulator.finish("layer"), WEIGHTS)
    torch.testing.assert_close(similarity, cosine_of_columns(logits[mask]), rtol=1e-5, atol=1e-5)


def test_centering_takes_the_mean_logit_of_each_token_away(logits):
    centered = logits.double() - logits.double().mean(1, keepdim=True)
    similarity = router_logit_similarity(statistics_of(logits), WEIGHTS, center=True)
    torch.testing.assert_close(similarity, cosine_of_columns(centered))


def test_a_shift_that_softmax_ignores_changes_only_the_uncentered_similarity(logits):
    logits = logits.double()
    shifted = logits + 10 * torch.randn(23, 1, generator=torch.Generator().manual_seed(1))
    plain = [router_logit_similarity(statistics_of(x), WEIGHTS) for x in (logits, shifted)]
    centered = [router_logit_similarity(statistics_of(x), WEIGHTS, center=True) for x in (logits, shifted)]
    torch.testing.assert_close(centered[0], centered[1])
    assert (plain[0] - plain[1]).abs().max() > 0.1


def test_an_expert_that_was_never_scored_is_like_no_other(logits):
    logits[:, 2] = 0
    similarity = router_logit_similarity(statistics_of(logits), WEIGHTS)
    assert similarity[2].tolist() == [0, 0, 1, 0, 0]
    assert similarity[:, 2].tolist() == [0, 0, 1, 0, 0]
    others = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(similarity[others][:, others], cosine_of_columns(logits[:, others]))


def test_one_token_leaves_only_the_sign():
    one = torch.tensor([[0.5, -2.0, 3.0, 0.0, 0.1]])
    signs = torch.tensor([1.0, -1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    expected = torch.outer(signs, signs)
    expected[3, 3] = 1
    torch.testing.assert_close(router_logit_similarity(statistics_of(one), WEIGHTS), expected)


def test_similarity_stays_between_minus_one_and_one():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, 1, generator=generator)
    parallel = base * torch.tensor([[1.0, 1e-4, -1e4, 3.0, -7.0]])  # rounding could leave the range
    similarity = router_logit_similarity(statistics_of(parallel), WEIGHTS)
    assert similarity.min() >= -1 and similarity.max() <= 1
    torch.testing.assert_close(similarity.abs(), torch.ones(5, 5, dtype=torch.float64))


def test_the_gram_of_the_statistics_is_left_alone(logits):
    statistics = statistics_of(logits)
    before = statistics["logit_gram"].clone()
    router_logit_similarity(statistics, WEIGHTS)
    router_logit_similarity(statistics, WEIGHTS, center=True)
    assert torch.equal(statistics["logit_gram"], before)
