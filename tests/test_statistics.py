"""Tests and intervals: worked values, slow against fast, and their level on made data."""

import numpy as np
import pytest
from scipy import stats

from hnerv_clip.verify import simulation, time_series
from hnerv_clip.verify.simulation import autoregression
from hnerv_clip.verify.time_series import (
    holm,
    mean_interval,
    median_interval,
    pool_intervals,
    shift_test,
    smooth_interval,
)


def test_shift_test_by_hand():
    # Prediction -2 1 1, mirrored to -2 1 1 1 1 -2, and target -1 -1 2; both have length √6. What
    # does not change, the 7, plays no part.
    found = shift_test(np.array([[-2, 7], [1, 7], [1, 7]]), np.array([[-1, 7], [-1, 7], [2, 7]]))
    assert found.observed == pytest.approx(3 / 6)
    np.testing.assert_allclose(found.null[0] * 6, [0, 0, -6, -3, 6], atol=1e-12)
    # The target mirrored to -1 -1 2 2 -1 -1 and the prediction as it is.
    np.testing.assert_allclose(found.null[1] * 6, [6, -3, -6, 0, 0], atol=1e-12)
    assert found.p == pytest.approx((2 + 1 + 1) / 12) and found.shifts == 12


def test_shift_test_equals_shifting_one_by_one():
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, 9, 3, 4))
    found = shift_test(p, g)
    p, g = ((x - x.mean(0)) / np.linalg.norm(x - x.mean(0)) for x in (p, g))
    by_hand = [[np.sum([(np.concatenate([a, a[::-1]])[(t + k) % 18] * b[t]).sum()
                        for t in range(9)]) for k in range(18)] for a, b in ((p, g), (g, p))]
    np.testing.assert_allclose(found.null, np.array(by_hand)[:, 1:])
    assert found.observed == pytest.approx(by_hand[1][0])
    assert found.observed == pytest.approx(np.corrcoef(p.ravel(), g.ravel())[0, 1])
    assert found.p == np.mean(np.array(by_hand) >= by_hand[0][0] - 1e-12)


def test_shift_test_finds_what_is_aligned_and_bounds_its_p():
    series = autoregression(np.random.default_rng(0), 1, 40, 8, 0.8)[0]
    found = shift_test(series, series)
    assert found.p == 1 / 80 and found.effect > 3
    constant = np.ones((40, 8))
    assert shift_test(constant, series).p == 1 and shift_test(constant, series).observed == 0


@pytest.mark.parametrize("rho", [0, 0.5, 0.9, 0.99])
def test_shift_test_keeps_its_level_on_autocorrelated_data(rho):
    found = simulation.simulate_shift_test(datasets=2000, frames=60, rhos=(rho,), effects=(0,))
    assert found.datasets[0] == 2000
    assert 0.035 <= found.rejected[0] <= 0.06  # of slow series it rejects a little less than 5 %


def test_shift_test_has_power():
    found = simulation.simulate_shift_test(datasets=200, frames=60, rhos=(0, 0.9), effects=(0.3,))
    assert found.rejected[0] > 0.99 and found.rejected[1] > 0.9


def test_a_plain_circular_shift_would_not_keep_the_level():
    """Why the series is mirrored: joined end to end, a slow series rejects far too often."""
    rng, rejected = np.random.default_rng(0), 0
    for _ in range(400):
        p, g = np.cumsum(rng.standard_normal((2, 40, 4)), axis=1)
        p, g = p - p.mean(0), g - g.mean(0)
        shifted = np.array([(np.roll(p, k, axis=0) * g).sum() for k in range(40)])
        rejected += np.mean(shifted >= shifted[0]) <= 0.05
    assert rejected / 400 > 0.1


def test_interval_of_independent_values_is_nearly_students():
    series = np.random.default_rng(0).standard_normal(4000) + 0.1
    found = mean_interval(series)
    low, high = stats.t.interval(0.95, 3999, series.mean(), stats.sem(series))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert found.p == pytest.approx(stats.ttest_1samp(series, 0, alternative="greater").pvalue,
                                    abs=1e-4)


def test_standard_error_is_that_of_resampled_blocks():
    """The closed form against drawing moving blocks, before the small-sample factor."""
    rng = np.random.default_rng(0)
    series = next(one for one in autoregression(rng, 50, 120, 1, 0.6)[..., 0]
                  if 120 % time_series.block_length(one) == 0 and time_series.block_length(one) > 3)
    found = mean_interval(series)
    starts = rng.integers(0, 121 - found.block, (20000, 120 // found.block))
    means = series[starts[..., None] + np.arange(found.block)].mean(axis=(1, 2))
    rho, share = time_series.cautious_lag_one(series), found.block / 120
    factor = time_series._inflation(120, rho) / (
        time_series._inflation(found.block, rho) - share * time_series._inflation(120, rho))
    assert found.standard_error == pytest.approx(means.std() * factor ** 0.5, rel=0.02)


def test_inflation_against_the_sum_of_covariances():
    lags = np.abs(np.subtract.outer(np.arange(7), np.arange(7)))
    assert time_series._inflation(7, 0.6) == pytest.approx((0.6 ** lags).sum() / 7)
    assert time_series._inflation(7, 0.0) == 1


def test_blocks_grow_with_autocorrelation():
    rng = np.random.default_rng(0)
    lengths = [np.mean([time_series.block_length(one[:, 0])
                        for one in autoregression(rng, 50, 200, 1, rho)])
               for rho in (0, 0.5, 0.9)]
    assert lengths[0] < 3 < lengths[1] < 10 < lengths[2]
    estimates = [time_series.lag_one(one[:, 0]) for one in autoregression(rng, 500, 40, 1, 0.7)]
    assert np.mean(estimates) == pytest.approx(0.7, abs=0.03)


def test_intervals_cover_and_tests_keep_their_level():
    found = simulation.simulate_interval(datasets=2000, frames=(26, 53, 106),
                                         rhos=(0, 0.5, 0.8))
    assert set(found.datasets) == {2000} and (found.covered > 0.9).all()
    assert (found.rejected <= 0.06 + 2 * 0.005).all()  # 5 % ± 1, and two standard errors
    # A slower series needs more frames: the page must not promise more than this.
    slow = simulation.simulate_interval(datasets=2000, frames=(13, 53), rhos=(0.9,)).rejected
    assert 0.07 < slow[0] < 0.15 and slow[1] < 0.07


def test_the_cautious_estimate_is_what_keeps_the_level(monkeypatch):
    monkeypatch.setattr(time_series, "cautious_lag_one", time_series.lag_one)
    plain = simulation.simulate_interval(datasets=2000, frames=(26,), rhos=(0.8, 0.9))
    assert (plain.rejected > 0.07).all()


def test_found_is_the_power_of_the_moved_series():
    rng = np.random.default_rng(0)
    series = autoregression(rng, 200, 26, 1, 0.5)[..., 0]
    by_hand = np.mean([mean_interval(one + 0.5).p <= 0.05 for one in series])
    found = simulation.simulate_interval(datasets=200, frames=(26,), rhos=(0.5,), seed=0)
    assert found.found[0] == pytest.approx(by_hand)


def test_pseudo_values_of_a_mean_are_its_values():
    series = autoregression(np.random.default_rng(0), 1, 40, 1, 0.5)[0, :, 0]
    without = (series.sum() - series) / 39
    found, expected = smooth_interval(series.mean(), without), mean_interval(series)
    assert vars(found) == pytest.approx(vars(expected))


def test_interval_of_a_ratio_covers_it():
    """A ratio of means, 1/2 in truth, of two series that move together."""
    rng, covered = np.random.default_rng(0), []
    for common, own in zip(*autoregression(rng, 400, 60, 2, 0.5).reshape(2, 200, 60, 2)):
        a, b = 1 + 0.2 * common[:, 0], 2 + 0.4 * common[:, 0] + 0.2 * own[:, 0]
        found = smooth_interval(a.sum() / b.sum(), (a.sum() - a) / (b.sum() - b))
        covered.append(found.low <= 0.5 <= found.high)
    assert 0.9 < np.mean(covered) < 0.985


@pytest.mark.parametrize("rho", [0, 0.6])
def test_interval_of_a_median_covers_it(rho):
    rng, covered = np.random.default_rng(0), []
    for values in autoregression(rng, 400, 60, 4, rho):
        found = median_interval(np.exp(values))  # median 1, far from symmetric
        assert found.low <= found.mean <= found.high
        covered.append(found.low <= 1 <= found.high)
    assert 0.91 < np.mean(covered) < 0.985


def test_median_interval_of_independent_values_is_that_of_order_statistics():
    values = np.random.default_rng(0).standard_normal(400)
    found = median_interval(values)
    low, high = np.sort(values)[stats.binom.ppf([0.025, 0.975], 400, 0.5).astype(int) - 1]
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def test_pooling_adds_the_spread_between_seeds():
    one = mean_interval(np.random.default_rng(0).standard_normal(50))
    same = pool_intervals([one.mean], [one.standard_error], [one.freedom])
    assert (same.low, same.high, same.p) == pytest.approx((one.low, one.high, one.p))
    # Seeds at 1, 2, 3: variance 1 between them, 1/3 of their mean; 0.5² of the frames.
    found = pool_intervals([1, 2, 3], [0.5] * 3, [10] * 3)
    assert found.standard_error ** 2 == pytest.approx(0.25 + 1 / 3)
    freedom = (0.25 + 1 / 3) ** 2 / (0.25 ** 2 / 10 + (1 / 3) ** 2 / 2)
    assert found.freedom == pytest.approx(freedom) and found.n == 3
    assert found.high == pytest.approx(2 + stats.t.ppf(0.975, freedom) * (0.25 + 1 / 3) ** 0.5)
    exact = pool_intervals([0.5, 0.5], [0, 0], [9, 9])
    assert (exact.low, exact.high, exact.p) == (0.5, 0.5, 0)


def test_pooled_interval_covers_the_truth():
    """Seeds share their frames' error; each adds its own."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):
        frames = rng.standard_normal(40)
        series = [frames + 0.3 * rng.standard_normal() + 0.3 * rng.standard_normal(40)
                  for _ in range(3)]
        parts = [mean_interval(one) for one in series]
        found = pool_intervals(*zip(*[(x.mean, x.standard_error, x.freedom) for x in parts]))
        covered.append(found.low <= 0 <= found.high)
    assert np.mean(covered) > 0.92


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, made monotone.
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])
    assert holm([]).size == 0


@pytest.mark.parametrize("call, message", [
    (lambda: shift_test(np.ones((1, 2)), np.ones((1, 2))), "at least 2 frames, got 1"),
    (lambda: shift_test(np.ones((3, 2)), np.ones((4, 2))), r"\(3, 2\).*\(4, 2\)"),
    (lambda: shift_test(np.full((3, 2), np.nan), np.ones((3, 2))), "NaN"),
    (lambda: mean_interval(np.ones(7)), "at least 8 frames, got 7"),
    (lambda: mean_interval(np.full(9, np.nan)), "NaN"),
    (lambda: pool_intervals([], [], []), "each seed's mean"),
    (lambda: pool_intervals([0.5, np.nan], [1, 1], [3, 3]), "all finite"),
    (lambda: holm([0.5, 1.5]), r"\[0, 1\]"),
    (lambda: holm([np.nan]), r"\[0, 1\]")])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_constant_difference_has_no_error():
    assert mean_interval(np.zeros(10)).p == 1 and mean_interval(np.ones(10)).p == 0
