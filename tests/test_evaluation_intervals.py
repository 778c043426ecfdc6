import numpy as np
import pytest
from scipy import stats

from hf_mcsmoe.evaluation.intervals import (
    CONFIDENCE,
    Interval,
    mean_of_bounded,
    normal_interval,
    ratio_of_sums,
    share_of_prompts,
    stratified,
    wilson_interval,
)

T_975 = {1: 12.706205, 2: 4.302653, 3: 3.182446}  # Student's quantiles from a printed table


def rows_of_text(generator, num_rows, mean=2.0):
    """Losses whose tokens depend on each other within a row, and rows of different length: sums and counts."""
    counts = generator.integers(5, 60, num_rows)
    of_row = generator.gamma(4.0, mean / 4.0, num_rows)  # skewed, shared by all tokens of a row
    noise = generator.normal(0, 1.5, num_rows) * np.sqrt(counts)
    return of_row * counts + noise, counts


def bootstrap(sums, counts, draws=4000):
    """Standard deviation of the ratio over rows drawn with replacement."""
    generator = np.random.default_rng(1)
    chosen = generator.integers(0, len(counts), (draws, len(counts)))
    return float((sums[chosen].sum(1) / counts[chosen].sum(1)).std())


def test_the_ratio_is_worked_out_by_hand():
    # Ratio 11/7; residuals 2 - 22/7, 8 - 44/7, 1 - 11/7; the row without tokens does not count.
    found = ratio_of_sums(np.array([2.0, 8.0, 0.0, 1.0]), np.array([2, 4, 0, 1]))
    residuals = np.array([-8, 12, -4]) / 7
    variance = 1.5 * (residuals**2).sum() / 49
    assert found.value == pytest.approx(11 / 7) and found.variance == pytest.approx(variance)
    reach = T_975[2] * np.sqrt(variance)
    interval = found.interval()
    assert (interval.low, interval.high) == pytest.approx((11 / 7 - reach, 11 / 7 + reach), abs=1e-6)
    assert found.interval(low=0.0, high=2.0) == Interval(0.0, 2.0)


def test_the_delta_method_agrees_with_a_bootstrap_over_rows():
    sums, counts = rows_of_text(np.random.default_rng(0), 200)
    found = ratio_of_sums(sums, counts)
    assert found.standard_error == pytest.approx(bootstrap(sums, counts), rel=0.05)
    by_token = np.sqrt((sums / counts).var() / counts.sum())
    assert found.standard_error > 3 * by_token  # tokens are not independent


# Few rows of skewed losses cover a little less than they should.
@pytest.mark.parametrize(("num_rows", "least"), [(12, 0.89), (64, 0.92)])
def test_intervals_of_ratios_cover_the_truth(num_rows, least):
    generator = np.random.default_rng(3)
    found = [ratio_of_sums(*rows_of_text(generator, num_rows)).interval() for _ in range(1500)]
    covered = np.mean([interval.low <= 2.0 <= interval.high for interval in found])
    assert least <= covered <= 0.965  # two standard errors of the simulation are 0.011


def test_intervals_of_paired_differences_cover_the_truth_and_are_narrower():
    generator = np.random.default_rng(4)
    covered, shorter = [], []
    for _ in range(1200):
        old, counts = rows_of_text(generator, 32)
        new = old + counts * generator.normal(0.1, 0.2, 32)
        interval = ratio_of_sums(new - old, counts).interval()
        alone = ratio_of_sums(new, counts).interval()
        covered.append(interval.low <= 0.1 <= interval.high)
        shorter.append(interval.high - interval.low < alone.high - alone.low)
    assert 0.93 <= np.mean(covered) <= 0.97 and np.mean(shorter) > 0.99


def test_intervals_of_strata_cover_the_truth():
    generator = np.random.default_rng(5)
    covered = []
    for _ in range(1200):
        domains = [rows_of_text(generator, number, mean) for number, mean in ((8, 1.0), (40, 3.0))]
        estimates = [ratio_of_sums(*domain) for domain in domains]
        interval = stratified(estimates, [0.25, 0.75]).interval()
        covered.append(interval.low <= 2.5 <= interval.high)
    assert 0.92 <= np.mean(covered) <= 0.97


def test_strata_add_their_variances_with_satterthwaites_degrees_of_freedom():
    a = ratio_of_sums(np.array([1.0, 3.0]), np.array([1, 1]))
    b = ratio_of_sums(np.array([2.0, 2.0, 5.0]), np.array([1, 1, 1]))
    both = stratified([a, b], [0.4, 0.6])
    parts = (0.16 * a.variance, 0.36 * b.variance)
    assert (a.variance, b.variance) == pytest.approx((1.0, 1.0))
    assert both.value == pytest.approx(0.4 * 2 + 0.6 * 3)
    assert both.variance == pytest.approx(sum(parts))
    assert both.degrees_of_freedom == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 1 + parts[1] ** 2 / 2))
    alone = stratified([a], [1.0])
    assert alone.interval().low == pytest.approx(2 - T_975[1], rel=1e-6)


def test_equal_rows_have_no_spread_and_one_row_has_no_interval():
    equal = ratio_of_sums(np.array([2.0, 4.0]), np.array([1, 2]))
    assert equal.interval() == Interval(2.0, 2.0)
    assert stratified([equal, equal], [0.5, 0.5]).interval() == Interval(2.0, 2.0)
    one = ratio_of_sums(np.array([2.0]), np.array([4]))
    assert one.value == 0.5 and one.interval() is None and one.standard_error is None
    assert stratified([equal, one], [0.5, 0.5]).interval() is None


def test_the_mean_of_prompts_has_students_interval_inside_its_bounds():
    found = mean_of_bounded([0.1, 0.2, 0.6], 0.0, 1.0)
    error = np.std([0.1, 0.2, 0.6], ddof=1) / np.sqrt(3)
    assert found.value == pytest.approx(0.3)
    assert found.interval.low == 0.0 and found.interval.high == pytest.approx(0.3 + T_975[2] * error, rel=1e-6)
    assert mean_of_bounded([0.4], 0.0, 1.0).interval is None


def test_equal_prompts_leave_room_for_those_not_seen():
    # With 20 equal prompts, others may be 13.9 % of all: 0.861 ** 20 = 0.05.
    found = mean_of_bounded([64.0] * 20, 0.0, 64.0)
    assert found.value == 64.0 and found.interval.high == 64.0
    assert found.interval.low == pytest.approx(64 * 0.05 ** (1 / 20))
    change = mean_of_bounded([0.0] * 20, -1.0, 1.0)
    assert change.interval.high == pytest.approx(1 - 0.05 ** (1 / 20)) == -change.interval.low


def test_intervals_of_prompts_cover_the_truth():
    generator = np.random.default_rng(6)
    values = generator.beta(2, 3, (1500, 16))
    rare = (generator.random((1500, 16)) < 0.05).astype(float)  # often none: the bound for equal values counts
    for draws, mean in ((values, 0.4), (rare, 0.05)):
        intervals = [mean_of_bounded(list(row), 0.0, 1.0).interval for row in draws]
        covered = np.mean([interval.low <= mean <= interval.high for interval in intervals])
        assert covered >= 0.93, mean


@pytest.mark.parametrize(("hits", "number"), [(0, 16), (3, 16), (16, 16), (7, 200)])
def test_shares_have_wilsons_interval(hits, number):
    found = share_of_prompts([True] * hits + [False] * (number - hits))
    expected = stats.binomtest(hits, number).proportion_ci(CONFIDENCE, method="wilson")
    assert found.value == hits / number
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(found.value, number) == found.interval
    assert share_of_prompts([True]).interval is None


def test_the_normal_interval_of_a_given_error():
    interval = normal_interval(0.5, 0.1)
    assert (interval.low, interval.high) == pytest.approx((0.5 - 0.1959964, 0.5 + 0.1959964), rel=1e-6)
    assert normal_interval(0.5, None) is None
