"""Tests and intervals: worked values, slow against fast, and their level on simulated data."""

import numpy as np
import pytest
from scipy import special, stats

from hnerv_clip.verify import simulation, time_series
from hnerv_clip.verify.time_series import (
    holm,
    mean_interval,
    median_interval,
    pool_intervals,
    smooth_interval,
)


def autoregression(rng, count, frames, size, rho):
    """[count, frames, size]"""
    return np.moveaxis(simulation.autoregression(rng, (frames, count, size), rho), 0, 1)


def test_intervals_cover_and_tests_keep_their_level():
    found = simulation.simulate_interval(datasets=500, series=("autoregression",))
    assert (found.covered > 0.93).all() and (found.rejected < 0.07).all()


@pytest.fixture
def fresh_models():
    time_series._models.cache_clear()
    yield
    time_series._models.cache_clear()


def test_net_wins_are_no_autoregression_and_blocks_see_it(monkeypatch):
    """Their correlation lasts longer than the next frame tells."""
    def covered():
        return simulation.simulate_interval(datasets=200, designs=("cross-fitted",), rhos=(0.97,),
                                            series=("net wins",)).covered.iloc[0]
    assert covered() > 0.95
    monkeypatch.setattr(time_series, "MIN_BLOCKS", 1000)
    assert covered() < 0.94


def test_without_long_time_scales_intervals_would_be_too_short(monkeypatch, fresh_models):
    monkeypatch.setattr(time_series, "SLOWEST", 8.0)
    short = simulation.simulate_interval(datasets=1000, designs=("quick",), rhos=(0.97,),
                                         series=("autoregression",))
    assert short.covered.iloc[0] < 0.9


def test_slow_series_count_as_few():
    series = autoregression(np.random.default_rng(0), 200, 132, 1, 0.9)[..., 0]
    lags = np.abs(np.subtract.outer(np.arange(132), np.arange(132)))
    exact = 132 ** 2 / (0.9 ** lags).sum()
    assert 0.4 * exact < np.median(time_series.effective_size(series)) < 1.2 * exact
    assert time_series.effective_size(np.ones(20)) == 20
    bounded = mean_interval(np.ones(20), least_variance=0.5)
    assert bounded.standard_error == pytest.approx((0.5 / 20) ** 0.5)
    assert bounded.freedom == pytest.approx(19)
    assert bounded.p_below(2) < 0.05 and not bounded.within(0.5) and bounded.within(2)


@pytest.mark.parametrize("length", [1, 3])
def test_models_by_hand(length):
    """Generalised least squares with each correlation matrix written out."""
    models = time_series._models(9, length)
    series = np.random.default_rng(0).standard_normal(9)
    ones, lags = np.ones(9), np.abs(np.subtract.outer(np.arange(9), np.arange(9)))
    for i, scale in enumerate(np.geomspace(1, 100 / length, time_series.TIME_SCALES)):
        matrix = (1 - 1 / scale) ** lags
        inverse = np.linalg.inv(matrix)
        rest = series - (ones @ inverse @ series) / (ones @ inverse @ ones)
        assert models.squares(series[None])[i, 0] == pytest.approx(rest @ inverse @ rest)
        assert models.inflation[i] == pytest.approx(matrix.mean())
        likelihood = -0.5 * np.linalg.slogdet(matrix)[1] - 0.5 * np.log(ones @ inverse @ ones)
        assert models.prior[i] == pytest.approx(likelihood)


def test_inverse_trigamma():
    values = np.array([1e-3, 0.1, 1.0, 30.0])
    assert special.polygamma(1, time_series._inverse_trigamma(values)) == pytest.approx(values)


def test_a_small_change_of_a_series_changes_no_answer():
    """Net wins over the mean per position of a quick run, 22 frames of eight patches, when one
    patch of two in ten frames goes to the other side. The low end of the interval fell as far as
    -0.2 where an autocorrelation was estimated."""
    wins = np.array([4, 4, 4, 4, 3, 4, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 1, 3, 4, 4, 4]) / 4
    rng, least = np.random.default_rng(0), {"least_variance": 0.144}
    plain = mean_interval(wins, **least)
    once = [wins + change for change in np.vstack([-np.eye(22), np.eye(22)]) / 4]
    often = [wins + rng.choice([-0.25, 0, 0.25], 22, p=[0.1, 0.8, 0.1]) for _ in range(100)]
    once, often = ([mean_interval(np.clip(series, -1, 1), **least) for series in changed]
                   for changed in (once, often))
    assert plain.p < 0.001 and max(found.p for found in once) < 0.005
    assert max(abs(found.low - plain.low) for found in once) < 0.25
    assert max(found.p for found in often) < 0.025
    assert np.std([found.low for found in often]) < 0.11


def test_interval_of_independent_values_is_nearly_students():
    series = np.random.default_rng(0).standard_normal(4000) + 0.1
    found = mean_interval(series)
    low, high = stats.t.interval(0.95, 3999, series.mean(), stats.sem(series))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert found.p == pytest.approx(stats.ttest_1samp(series, 0, alternative="greater").pvalue,
                                    abs=1e-3)


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
    assert 0.91 < np.mean(covered) < 0.995


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
