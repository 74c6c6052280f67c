"""Means of series in time, where neighbouring frames are not independent: intervals and tests.

A series of n frames counts as `effective_size` independent values, the *equivalent sample size* of
a first-order autoregression (Zwiers and von Storch 1995, J. Climate 8, 336–351), and its mean is
tested with Student's t of that many values. Net wins are signs of a difference, and signs of an
autoregression are none themselves: their correlation begins lower and lasts longer than the one at
lag 1 tells. So means over blocks of frames (batch means; Conway 1963, Management Science 10, 47–61)
are looked at in the same way, and the largest standard error counts. `mean_interval` does this,
`smooth_interval` and `median_interval` for other statistics, `pool_intervals` for several seeds.
How often they err is measured in `simulation`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

MIN_FRAMES = 8  # fewer frames tell nothing about autocorrelation
CAUTION = 1.0  # standard errors that are added to an estimated autocorrelation
LARGEST = 0.99  # autocorrelation at most
BLOCKS = (4, 8)  # frames of a block whose mean is one value
MIN_BLOCKS = 16  # fewer cost more power than they save errors


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, and the one-sided p-value of a mean of 0 or less.

    effective_size: how many independent frames tell as much. freedom: degrees of freedom of
    Student's t. n: frames, or seeds where those were pooled.
    """

    mean: float
    low: float
    high: float
    p: float
    standard_error: float
    freedom: float
    effective_size: float
    n: int

    def p_below(self, bound: float) -> float:
        """One-sided p-value of a mean of `bound` or more; small: the mean lies below it."""
        return _tail(bound - self.mean, self.standard_error, self.freedom)

    def within(self, margin: float, level: float = 0.05) -> bool:
        """Whether the mean lies in ±margin, by two one-sided tests (Schuirmann 1987)."""
        above = _tail(margin + self.mean, self.standard_error, self.freedom)
        return max(above, self.p_below(margin)) < level


def lag_one(series: np.ndarray, *, caution: float = CAUTION) -> np.ndarray:
    """Autocorrelation at lag 1 over the last axis, cautiously estimated.

    The estimate r of a series of n lies about (1 + 3ρ) / n below ρ, which is corrected (Kendall
    1954), and one that is above 0 gets `caution` standard errors √((1 - ρ²) / n + 4 / n²) on top
    (at most its own size), since one that is too low costs more; the second term stands for the
    wider spread near 1. Negative values count as 0, none is above `LARGEST`.

    Args:
        series: [..., n], n of at least 4.
    """
    series = np.asarray(series, np.float64)
    series = series - series.mean(axis=-1, keepdims=True)
    count, power = series.shape[-1], (series ** 2).sum(axis=-1)
    raw = (series[..., 1:] * series[..., :-1]).sum(axis=-1) / np.maximum(power, 1e-30)
    rho = np.clip((count * raw + 1) / (count - 3), 0, 0.99)
    error = caution * np.sqrt((1 - rho ** 2) / count + 4 / count ** 2)
    raised = np.minimum(rho + np.minimum(error, rho), LARGEST)
    return np.where((power > 1e-24) & (rho > 0), raised, 0.0)


def variance_inflation(count: int, rho: Any) -> np.ndarray | float:
    """Variance of the mean of `count` values of an AR(1), times count, for unit variance."""
    return (1 + rho) / (1 - rho) - 2 * rho * (1 - rho ** count) / (count * (1 - rho) ** 2)


def effective_size(series: np.ndarray) -> np.ndarray:
    """Independent values whose mean varies as that of a series, over the last axis [..., n]."""
    return mean_statistics(series)[3]


def mean_statistics(series: np.ndarray) -> tuple[np.ndarray, ...]:
    """(mean, standard error, degrees of freedom, effective size) over the last axis [..., n].

    The last three from the values themselves, or from means over blocks of `BLOCKS` frames (the
    frames that are left over at the ends go without) where that standard error is larger; these
    are less noisy, so that they go without `CAUTION`. There is always at least one degree of
    freedom.
    """
    series = np.asarray(series, np.float64)
    found = _spread(series, CAUTION)
    count = series.shape[-1]
    for length in BLOCKS:
        blocks = count // length
        if blocks < MIN_BLOCKS:
            break
        first = (count - blocks * length) // 2
        means = series[..., first:first + blocks * length].reshape(
            *series.shape[:-1], blocks, length).mean(axis=-1)
        other = _spread(means, 0.0)
        found = tuple(np.where(other[0] > found[0], b, a) for a, b in zip(found, other))
    return series.mean(axis=-1), *found


def _spread(series, caution):
    """(standard error of the mean, degrees of freedom, effective size) over the last axis.

    The sample variance of a persistent series is too small by its mean's own variance, which is
    put right.
    """
    count = series.shape[-1]
    size = count / variance_inflation(count, lag_one(series, caution=caution))
    variance = series.var(axis=-1) / size / np.maximum(1 - 1 / size, 0.05)
    return np.sqrt(variance), np.maximum(size - 1, 1), size


def mean_interval(series: np.ndarray, *, level: float = 0.95, least_variance: float = 0.0
                  ) -> Interval:
    """Confidence interval of the mean of a series in time; see the module's top.

    Measured over AR(1) series of 22, 26 and 132 frames with autocorrelations to 0.97, and over net
    wins of equals: see `simulation`.

    Args:
        series: [n] values in order of time.
        least_variance: of the values, for those that are bounded and may all be equal.
    Raises:
        ValueError: fewer than 8 values, or NaN.
    """
    series = np.asarray(series, np.float64).ravel()
    if len(series) < MIN_FRAMES:
        raise ValueError(f"an interval needs at least {MIN_FRAMES} frames, got {len(series)}: their"
                         " autocorrelation cannot be estimated; hold out more frames")
    if not np.isfinite(series).all():
        raise ValueError("the series holds NaN or infinite values; look for NaN embeddings")
    mean, error, freedom, size = (float(x) for x in mean_statistics(series))
    error = max(error, np.sqrt(least_variance / size))
    return make_interval(mean, error, freedom, level=level, size=size, count=len(series))


def make_interval(mean: float, error: float, freedom: float, *, level: float = 0.95,
                  size: float = np.nan, count: int = 0) -> Interval:
    """Student's interval of a mean with its standard error and degrees of freedom."""
    reach = stdtrit(freedom, (1 + level) / 2) * error
    return Interval(float(mean), float(mean - reach), float(mean + reach),
                    _tail(mean, error, freedom), float(error), float(freedom), float(size), count)


def _tail(distance, error, freedom):
    if error <= 1e-12:
        return float(distance <= 1e-12)
    return float(stdtr(freedom, -distance / error))


def smooth_interval(value: float, without: np.ndarray, *, level: float = 0.95) -> Interval:
    """Confidence interval of a smooth statistic of frames in time, such as a ratio or a CKA.

    Its jackknife pseudo-values n·value - (n - 1)·without (Tukey 1958) are a series whose mean
    stands for it; for a mean they are the values themselves.

    Args:
        value: the statistic of all frames.
        without: [n] the statistic without each frame, in order of time.
    """
    without = np.asarray(without, np.float64)
    found = mean_interval(len(without) * value - (len(without) - 1) * without, level=level)
    return make_interval(value, found.standard_error, found.freedom, level=level,
                         size=found.effective_size, count=found.n)


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
    error = (high - low) / 2 / stdtrit(share.freedom, (1 + level) / 2)
    found = make_interval(median, error, share.freedom, level=level, size=share.effective_size,
                          count=share.n)
    return replace(found, low=float(low), high=float(high))


def pool_intervals(means: npt.ArrayLike, errors: npt.ArrayLike, freedoms: npt.ArrayLike, *,
                   level: float = 0.95) -> Interval:
    """One interval for the mean over seeds, whose results are over the same frames.

    The variance is the mean of the seeds' squared standard errors, which more seeds do not lower
    since their frames are the same, plus the variance between seeds divided by their number; its
    degrees of freedom are Satterthwaite's (1946). Of one seed it is that seed's interval.

    Args:
        means, errors, freedoms: [n] of each seed: value, standard error and degrees of freedom.
    Returns:
        An Interval whose n is the number of seeds; effective_size is NaN.
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
    return make_interval(means.mean(), np.sqrt(variance), freedom, level=level, count=seeds)


def holm(p_values: npt.ArrayLike) -> np.ndarray:
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
