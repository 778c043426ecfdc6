"""Streamed sums equal a count that looks at one token after the other."""

import pytest
import torch

from hf_mcsmoe.executors.accumulator import StatisticsAccumulator
from hf_mcsmoe.observation.observed import ObservedTokens, sum_dtype
from hf_mcsmoe.statistics import STATISTICS

NUM_SLOTS, TOP_K, NUM_TOKENS = 6, 2, 37
ALL = frozenset(
    name
    for name in STATISTICS
    if STATISTICS.trait(name, "of") == "slots" and not STATISTICS.trait(name, "gradients", False)
)


@pytest.fixture
def tokens():
    """Routing of 37 tokens, some of them padding, some slots skipped, slot 4 never chosen."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_TOKENS, NUM_SLOTS, generator=generator)
    logits[:, 4] -= 20
    weights, index = logits.softmax(-1).topk(TOP_K)
    weights[torch.rand(weights.shape, generator=generator) < 0.15] = 0.0
    mask = torch.rand(NUM_TOKENS, generator=generator) > 0.2
    assert 0 < mask.sum() < NUM_TOKENS and (weights[mask] == 0).any() and (weights[~mask] != 0).any()
    return {"top_k_index": index, "top_k_weights": weights, "token_mask": mask, "logits": logits}


def feed(accumulator, tokens, batches):
    for rows in batches:
        taken = {name: value[rows] for name, value in tokens.items()}
        accumulator.update(ObservedTokens(accumulator.num_slots, torch.zeros(len(rows), 3), **taken))
    return accumulator


def streamed(tokens, batches, needs=ALL):
    return feed(StatisticsAccumulator(NUM_SLOTS, needs), tokens, batches).finish("layer")


def ragged_batches():
    return list(torch.arange(NUM_TOKENS).split(8))  # 37 = 4 * 8 + 5: the last batch is shorter


def assert_same(left, right):
    assert left.num_tokens == right.num_tokens
    assert torch.equal(left.selection_count, right.selection_count)
    torch.testing.assert_close(left["gate_sum"], right["gate_sum"])
    torch.testing.assert_close(left["logit_gram"], right["logit_gram"], rtol=1e-5, atol=1e-5)


def test_streamed_statistics_match_a_token_by_token_count(tokens):
    num_tokens, count, gate_sum = 0, [0] * NUM_SLOTS, [0.0] * NUM_SLOTS
    for token in range(NUM_TOKENS):
        if not tokens["token_mask"][token]:
            continue
        num_tokens += 1
        chosen = zip(tokens["top_k_index"][token].tolist(), tokens["top_k_weights"][token].tolist(), strict=True)
        for slot, weight in chosen:
            if weight != 0:
                count[slot] += 1
                gate_sum[slot] += weight
    statistics = streamed(tokens, ragged_batches())
    assert statistics.num_tokens == num_tokens
    assert statistics.selection_count.tolist() == count
    assert count[4] == 0, "the unused slot is part of the test"
    torch.testing.assert_close(statistics["gate_sum"], torch.tensor(gate_sum, dtype=torch.float64))


def test_the_gram_is_that_of_the_logits_of_real_tokens(tokens):
    real = tokens["logits"][tokens["token_mask"]].double()
    gram = streamed(tokens, ragged_batches())["logit_gram"]
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, real.T @ real, rtol=1e-5, atol=1e-5)


def test_padding_tokens_do_not_count_whatever_they_hold(tokens):
    clean = streamed(tokens, ragged_batches())
    padding = ~tokens["token_mask"]
    tokens["logits"][padding] = float("nan")
    tokens["top_k_weights"][padding] = float("inf")
    tokens["top_k_index"][padding] = 0
    assert_same(streamed(tokens, ragged_batches()), clean)


def test_a_batch_of_padding_alone_adds_nothing(tokens):
    nothing = {**tokens, "token_mask": torch.zeros(NUM_TOKENS, dtype=torch.bool)}
    accumulator = feed(StatisticsAccumulator(NUM_SLOTS, ALL), tokens, ragged_batches())
    before = accumulator.finish("layer")
    assert_same(feed(accumulator, nothing, [torch.arange(NUM_TOKENS)]).finish("layer"), before)


def test_batch_size_and_order_do_not_matter(tokens):
    whole = streamed(tokens, [torch.arange(NUM_TOKENS)])
    assert_same(streamed(tokens, ragged_batches()), whole)
    assert_same(streamed(tokens, ragged_batches()[::-1]), whole)
    shuffled = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(1))
    assert_same(streamed(tokens, shuffled.split(1)), whole)


def test_added_accumulators_equal_one_that_saw_everything(tokens):
    batches = ragged_batches()
    first = feed(StatisticsAccumulator(NUM_SLOTS, ALL), tokens, batches[:2])
    second = feed(StatisticsAccumulator(NUM_SLOTS, ALL), tokens, batches[2:])
    first.add(second)
    assert_same(first.finish("layer"), streamed(tokens, batches))


def test_an_accumulator_that_saw_nothing_changes_no_sum_and_takes_all_of_another(tokens):
    full = feed(StatisticsAccumulator(NUM_SLOTS, ALL), tokens, ragged_batches())
    empty = StatisticsAccumulator(NUM_SLOTS, ALL)
    expected = full.finish("layer")
    full.add(empty)
    assert_same(full.finish("layer"), expected)
    empty.add(full)
    assert_same(empty.finish("layer"), expected)


def test_only_what_is_asked_for_is_collected(tokens):
    needs = frozenset({"gate_sum"})
    statistics = streamed({**tokens, "logits": tokens["logits"][:, :0]}, ragged_batches(), needs)
    assert set(statistics.sums) == {"gate_sum"} and statistics["selection_count"] is statistics.selection_count
    with pytest.raises(KeyError, match=r"'gate_sum' was not collected.*Name it in `needs`"):
        streamed(tokens, ragged_batches(), frozenset())["gate_sum"]


def test_sums_of_bfloat16_weights_do_not_lose_small_terms():
    # 1 + 2^-9 is no bfloat16 number; a sum kept in that dtype would stay at 1 for ever.
    weights = torch.tensor([[1.0], *[[2.0**-9]] * 512], dtype=torch.bfloat16)
    index, mask = torch.zeros(513, 1, dtype=torch.int64), torch.ones(513, dtype=torch.bool)
    accumulator = StatisticsAccumulator(1, frozenset({"gate_sum"}))
    for row in range(513):
        rows = slice(row, row + 1)
        accumulator.update(ObservedTokens(1, torch.zeros(1, 3), index[rows], weights[rows], mask[rows]))
    assert accumulator.finish("layer")["gate_sum"].item() == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_logit_is_reported_with_its_expert_alone(tokens, value):
    token = tokens["token_mask"].nonzero()[3]
    tokens["logits"][token, 5] = value
    with pytest.raises(ValueError, match=r"logit_gram of 'model.layers.1.experts' is NaN or Inf for expert \[5\]\."):
        feed(StatisticsAccumulator(NUM_SLOTS, ALL), tokens, ragged_batches()).finish("model.layers.1.experts")


def test_a_bad_weight_is_reported_with_the_expert_that_got_it(tokens):
    token = tokens["token_mask"].nonzero()[0, 0]
    tokens["top_k_weights"][token, 1] = float("nan")
    slot = tokens["top_k_index"][token, 1].item()
    with pytest.raises(ValueError, match=rf"gate_sum of 'layer' is NaN or Inf for expert \[{slot}\]\."):
        streamed(tokens, ragged_batches())


@pytest.mark.parametrize("batches", [[], [torch.arange(NUM_TOKENS)]], ids=["no batch", "all padding"])
def test_a_layer_that_no_token_reached_is_named_with_the_remedy(tokens, batches):
    tokens["token_mask"] = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    message = "No calibration token reached 'layer'.*exclude_layers"
    with pytest.raises(ValueError, match=message):
        streamed(tokens, batches)


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match=r"Unknown statistic 'logit_sum'; choose one of .*'gate_sum', .*Did you mean"):
        StatisticsAccumulator(NUM_SLOTS, frozenset({"gate_sum", "logit_sum"}))


def test_sums_are_float64_where_the_device_has_it():
    assert sum_dtype(torch.device("cpu")) == torch.float64
    assert sum_dtype(torch.device("cuda")) == torch.float64
    assert sum_dtype(torch.device("mps")) == torch.float32
