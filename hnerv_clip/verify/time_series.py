"""Tests and intervals for series in time, where neighbouring frames are not independent.

`shift_test`: is a prediction aligned in time with its target? `mean_interval`: how sure is the mean
of a per-frame difference? `median_interval` and `smooth_interval` carry that over to other
statistics, `pool_intervals` to several seeds. `holm`: what remains when several comparisons are
made. How often they err on made data: `simulation`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

MIN_FRAMES = 8  # fewer frames tell nothing about autocorrelation


@dataclass(frozen=True)
class ShiftTest:
    """observed: the correlation as aligned. p: one-sided.

    null: [2, 2T - 1], the statistic under every other shift, by 1 to 2T - 1 frames, of the mirrored
        prediction and of the mirrored target.
    effect: (observed - mean of null) / standard deviation of null.
    shifts: how many shifts were made in all, the aligned one counted for both series: 4T. No p is
        below 2 / shifts.
    """

    observed: float
    null: np.ndarray
    p: float
    effect: float
    shifts: int


def shift_test(predicted: np.ndarray, target: np.ndarray) -> ShiftTest:
    """Test whether a prediction knows when things happen, by all circular shifts in time.

    The statistic is the correlation of what changes: the mean over time is taken off every value,
    since a position that always looks alike says nothing about time. Under the null hypothesis the
    prediction is stationary and independent of the target, so it could as well
    have been shifted; the autocorrelation of both stays whole. A plain circular shift joins the
    last frame to the first, a break that the aligned series lacks, and so rejects too often on slow
    series (10 to 20 % in place of 5 where they drift). Therefore one of the two is first mirrored,
    to 2T frames without a break, and all 2T shifts of that are made; then the same with the other,
    and p is the share of all 4T that do as well as the aligned one. This supposes in addition that
    under the null a series is as likely as its reverse. Measured on AR(1) series with lag-one
    autocorrelation up to 0.99 (`simulate_shift_test`), 5 % means 4 to 5 % at 60 and more frames,
    4 to 5 % at 26, and 2 to 3 % at 13.

    Args:
        predicted, target: [T, ...] floats of the same shape. One that does not change at all has
            correlation 0 and p 1.
    Raises:
        ValueError: shapes differ, NaN, or fewer than 2 frames.
    """
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    frames = len(target)
    if predicted.shape != target.shape:
        raise ValueError(f"predicted has shape {predicted.shape}, the target {target.shape}; "
                         "give the same frames of both")
    if frames < 2:
        raise ValueError(f"a shift in time needs at least 2 frames, got {frames}")
    moving = [(series - series.mean(axis=0)).reshape(frames, -1) for series in (target, predicted)]
    if not all(np.isfinite(series).all() for series in moving):
        raise ValueError("the embeddings hold NaN or infinite values; encode or train again")
    sizes = [max(np.linalg.norm(series), 1e-6) for series in moving]  # less is rounding
    products = (moving[0] / sizes[0]) @ (moving[1] / sizes[1]).T  # [T, T]
    places = (np.arange(frames)[:, None] + np.arange(2 * frames)) % (2 * frames)
    totals = np.stack([
        np.take_along_axis(np.concatenate([side, side[:, ::-1]], axis=1), places, axis=1).sum(0)
        for side in (products, products.T)])
    observed, null = totals[0, 0], totals[:, 1:]
    tolerance = 1e-9  # equal up to rounding counts as equal
    p = (2 + (null >= observed - tolerance).sum()) / (4 * frames)
    spread = null.std(ddof=1)
    effect = (observed - null.mean()) / spread if spread > tolerance else 0.0
    return ShiftTest(float(observed), null, float(p), float(effect), 4 * frames)


def lag_one(series: np.ndarray) -> float:
    """Autocorrelation at lag 1, corrected for its bias towards 0 in short series.

    Kendall (1954): the estimate r of a series of n lies about (1 + 3ρ) / n below ρ. Clipped to
    [0, 0.9]: negative values are taken as none, which makes intervals wider, and beyond 0.9 the
    corrections that are made with it get wild in short series without covering better.
    """
    series = np.asarray(series, np.float64) - np.mean(series)
    count, power = len(series), series @ series
    if count < 4 or power < 1e-24:
        return 0.0
    raw = (series[1:] @ series[:-1]) / power
    return float(np.clip((count * raw + 1) / (count - 3), 0, 0.9))


def cautious_lag_one(series: np.ndarray) -> float:
    """`lag_one` and its standard error √((1 - ρ²) / n) on top, where it is above 0; at most 0.95.

    An estimate that happens to be low makes an interval too narrow, and costs more than one that is
    high. With the plain estimate the interval of a slow series of 26 frames (ρ = 0.8) rejects a
    true mean of 0 in 8 to 9 % in place of 5, with this one in 6 (`simulate_interval`).
    """
    rho = lag_one(series)
    return float(min(rho + np.sqrt((1 - rho ** 2) / len(series)), 0.95)) if rho > 0 else 0.0


def block_length(series: np.ndarray) -> int:
    """Length of the blocks of `mean_interval`, from the autocorrelation.

    The rule of Künsch (1989), for a series that decays as an AR(1):
    (√6 ρ / (1 - ρ²))^(2/3) n^(1/3); at most a third of the series.
    """
    count, rho = len(series), cautious_lag_one(series)
    wanted = np.ceil((np.sqrt(6) * rho / (1 - rho ** 2)) ** (2 / 3) * count ** (1 / 3))
    return int(np.clip(wanted, 1, max(1, count // 3)))


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, and the one-sided p-value of a mean of 0 or less.

    freedom: degrees of freedom of Student's t in both. block: frames a block, of n.
    """

    mean: float
    low: float
    high: float
    p: float
    standard_error: float
    freedom: float
    block: int
    n: int


def mean_interval(series: np.ndarray, *, level: float = 0.95) -> Interval:
    """Confidence interval of the mean of a series in time, by the moving-block bootstrap.

    The standard error is that of the moving-block bootstrap (Künsch 1989), which for a mean needs
    no resampling: the spread of all block means times the square root of blocks per series. Blocks
    cut off long correlations and their mean varies less than it should in short series; the factor
    for both is computed for an AR(1) of `cautious_lag_one`. The interval uses Student's t with
    n / block - 1 degrees of freedom. How often it covers: `simulate_interval`.

    Args:
        series: [n] values in order of time.
    Raises:
        ValueError: fewer than 8 values, or NaN.
    """
    series = np.asarray(series, np.float64).ravel()
    count = len(series)
    if count < MIN_FRAMES:
        raise ValueError(f"an interval needs at least {MIN_FRAMES} frames, got {count}: their "
                         "autocorrelation can't be told; hold out more frames")
    if not np.isfinite(series).all():
        raise ValueError("the series holds NaN or infinite values; look for NaN embeddings")
    block, mean = block_length(series), series.mean()
    sums = np.concatenate([[0], np.cumsum(series)])
    block_means = (sums[block:] - sums[:-block]) / block
    variance = block_means.var() * block / count
    rho, ratio = cautious_lag_one(series), block / count
    variance *= _inflation(count, rho) / (_inflation(block, rho) - ratio * _inflation(count, rho))
    return _interval(mean, np.sqrt(variance), count / block - 1, level, block, count)


def _interval(mean, error, freedom, level, block, count):
    reach = stats.t.ppf((1 + level) / 2, freedom) * error
    p = float(stats.t.sf(mean / error, freedom)) if error > 1e-12 else float(mean <= 1e-12)
    return Interval(float(mean), float(mean - reach), float(mean + reach), p, float(error),
                    float(freedom), block, count)


def smooth_interval(value: float, without: np.ndarray, *, level: float = 0.95) -> Interval:
    """Confidence interval of a smooth statistic of frames in time, such as a ratio or a CKA.

    Its jackknife pseudo-values n·value - (n - 1)·without (Tukey 1958) are a series whose mean
    stands for it; for a mean they are the values themselves. `mean_interval` of them is the
    moving-block bootstrap to first order. Drawing frames again would not do for a CKA, where a
    frame drawn twice counts as two that agree.

    Args:
        value: the statistic of all frames.
        without: [n] the statistic without each frame, in order of time.
    """
    without = np.asarray(without, np.float64)
    found = mean_interval(len(without) * value - (len(without) - 1) * without, level=level)
    return _interval(value, found.standard_error, found.freedom, level, found.block, found.n)


def median_interval(values: np.ndarray, *, level: float = 0.95) -> Interval:
    """Confidence interval of the median of all values of frames in time.

    Woodruff (1952): the interval of the share of values below the median, by `mean_interval`,
    carried over to the values. The ends need not lie equally far away. p is that of a median of 0.

    Args:
        values: [n, ...] values of each frame, in order of time.
    """
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    median = np.median(values)
    below = (values < median).mean(axis=1) + (values == median).mean(axis=1) / 2
    share = mean_interval(below, level=level)
    reach = (share.high - share.low) / 2
    low, high = np.quantile(values, np.clip([0.5 - reach, 0.5 + reach], 0, 1))
    error = (high - low) / 2 / stats.t.ppf((1 + level) / 2, share.freedom)
    found = _interval(median, error, share.freedom, level, share.block, share.n)
    return replace(found, low=float(low), high=float(high))


def pool_intervals(means, errors, freedoms, *, level: float = 0.95) -> Interval:
    """One interval for the mean over seeds, whose results are over the same frames.

    The variance is the mean of the seeds' squared standard errors, which more seeds do not lower
    since their frames are the same, plus the variance between seeds divided by their number; its
    degrees of freedom are Satterthwaite's (1946). Of one seed it is that seed's interval.

    Args:
        means, errors, freedoms: [n] of each seed: value, standard error and degrees of freedom.
    Returns:
        An Interval whose n is the number of seeds; block is 0.
    Raises:
        ValueError: no seed, NaN, or other numbers of values.
    """
    means, errors, freedoms = (np.asarray(x, np.float64) for x in (means, errors, freedoms))
    seeds = len(means)
    if not seeds or not means.shape == errors.shape == freedoms.shape \
            or not np.isfinite([means, errors, freedoms]).all():
        raise ValueError("give each seed's mean, standard error and degrees of freedom, all finite;"
                         f" got {means.tolist()}, {errors.tolist()}, {freedoms.tolist()}")
    parts = [(np.mean(errors ** 2), np.mean(freedoms))]
    if seeds > 1:
        parts += [(means.var(ddof=1) / seeds, seeds - 1)]
    variance = sum(part for part, _ in parts)
    weights = sum(part ** 2 / freedom for part, freedom in parts)
    freedom = variance ** 2 / weights if weights > 0 else parts[0][1]
    return _interval(means.mean(), np.sqrt(variance), freedom, level, 0, seeds)


def _inflation(count: int, rho: float) -> float:
    """Variance of the mean of `count` values of an AR(1), times count, for unit variance."""
    return (1 + rho) / (1 - rho) - 2 * rho * (1 - rho ** count) / (count * (1 - rho) ** 2)


def holm(p_values) -> np.ndarray:
    """Holm's (1979) adjusted p-values: below α, the hypothesis falls at family-wise level α.

    Raises:
        ValueError: a value outside [0, 1] or NaN.
    """
    p_values = np.asarray(p_values, np.float64).ravel()
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1]: {p_values.tolist()}")
    order = np.argsort(p_values, kind="stable")
    stepped = p_values[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted
