"""Means of series in time, where neighbouring frames are not independent: intervals and tests.

A series is taken as a first-order autoregression around its mean. An autocorrelation estimated from
some twenty frames is unsteady, and so is a p-value that rests on it; so none is estimated. The
standard error is averaged over autocorrelations instead, each weighted by how likely the series
makes it (Zellner and Tiao 1964, J. Am. Stat. Assoc. 59, 763–778, with a flat prior of the logarithm
of the time scale 1 / (1 - ρ)), and the less they agree, the fewer degrees of freedom Student's t
gets. Every step is smooth in the data: a small change of the series changes p little.

Net wins are signs of a difference, and signs of an autoregression are none themselves: they stay
correlated for longer than the next frame tells. So long series are averaged over blocks of frames
first (batch means; Conway 1963, Management Science 10, 47–61). `mean_interval` does all this,
`smooth_interval` and `median_interval` for other statistics, `pool_intervals` for several seeds.
How often they err is measured in `simulation`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import digamma, polygamma, stdtr, stdtrit

MIN_FRAMES = 8  # fewer frames tell nothing about autocorrelation
SLOWEST = 100.0  # frames: the longest time scale 1 / (1 - ρ)
TIME_SCALES = 21  # from 1 frame to the slowest, evenly in the logarithm
MIN_BLOCKS = 44  # of a series that is averaged over blocks of frames; shorter ones are left as is


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, and the one-sided p-value of a mean of 0 or less.

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


class _Models(NamedTuple):
    """First-order autoregressions of n values and unit variance, one of each time scale.

    basis: [R, n, n] eigenvectors of the correlation matrix. ones: [R, n] a vector of ones in that
    basis. power: [R, n] eigenvalues. inflation: [R] variance of the mean. prior: [R] logarithm of
    all factors of the likelihood that do not depend on the data.
    """

    basis: np.ndarray
    ones: np.ndarray
    power: np.ndarray
    inflation: np.ndarray
    prior: np.ndarray

    def squares(self, series: np.ndarray) -> np.ndarray:
        """Generalised sums of squares around the mean: [M, n] → [R, M]."""
        values = series @ self.basis  # [R, M, n]
        weights = (1 / self.power)[..., None]
        precision = (self.ones ** 2 / self.power).sum(axis=1)
        across = (values @ (weights * self.ones[..., None]))[..., 0]
        return (values ** 2 @ weights)[..., 0] - across ** 2 / precision[:, None]


@lru_cache(maxsize=32)
def _models(count: int, length: int) -> _Models:
    """The models of `count` means over blocks of `length` frames."""
    rho = 1 - 1 / np.geomspace(1, max(4, SLOWEST / length), TIME_SCALES)
    lags = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    power, basis = np.linalg.eigh(rho[:, None, None] ** lags)
    power, ones = np.maximum(power, 1e-9), basis.sum(axis=1)
    prior = -0.5 * (np.log(power).sum(axis=1) + np.log((ones ** 2 / power).sum(axis=1)))
    return _Models(basis, ones, power, (power * ones ** 2).sum(axis=1) / count ** 2, prior)


def mean_statistics(series: npt.ArrayLike, *, least_variance: float = 0.0
                    ) -> tuple[np.ndarray, ...]:
    """(mean, standard error, degrees of freedom, effective size) over the last axis [..., n].

    With a model's autocorrelation, the variance of the mean is scaled inverse chi-squared with
    n - 1 degrees of freedom. The mixture of all models is replaced by the one such distribution
    whose logarithm has the same mean and variance (as Smyth 2004, Stat. Appl. Genet. Mol. Biol.
    3, 3, fits them). A missing variance is then added to it.

    Args:
        series: [..., n] values in order of time.
        least_variance: of the values, for those that are bounded and may all be equal; what their
            own is short of it is added as white noise.
    """
    series = np.asarray(series, np.float64)
    count, lead = series.shape[-1], series.shape[:-1]
    flat = series.reshape(-1, count)
    mean, variance = flat.mean(axis=1), flat.var(axis=1)
    missing = np.maximum(least_variance - variance, 0)
    length = max(1, count // MIN_BLOCKS)
    blocks = count // length
    first = (count - blocks * length) // 2
    values = (flat - mean[:, None])[:, first:first + blocks * length]
    values = values.reshape(-1, blocks, length).mean(axis=2)

    models, freedom = _models(blocks, length), blocks - 1
    squares = np.maximum(models.squares(values), 1e-30)  # [R, M]
    weights = models.prior[:, None] - freedom / 2 * np.log(squares)
    weights = np.exp(weights - weights.max(axis=0))
    weights /= weights.sum(axis=0)
    logs = np.log(squares / freedom * models.inflation[:, None])  # of the mean's variance
    centre = (weights * logs).sum(axis=0)
    spread = (weights * (logs - centre) ** 2).sum(axis=0)
    half = _inverse_trigamma(spread + polygamma(1, freedom / 2))
    own = np.exp(centre - digamma(freedom / 2) + np.log(freedom / 2) + digamma(half) - np.log(half))
    own = np.where(variance > 1e-24, own, 0)
    error, half = _add_variances(own, half, missing / count, (count - 1) / 2)
    size = np.where(error > 0, 1 + (variance + missing) / np.maximum(error, 1e-30), count)
    return tuple(x.reshape(lead) for x in (mean, np.sqrt(error), 2 * half,
                                           np.minimum(size, count)))


def _add_variances(a, freedom_a, b, freedom_b):
    """(sum, degrees of freedom by Satterthwaite 1946)"""
    total = a + b
    share = np.where(total > 0, a / np.maximum(total, 1e-30), 0)
    return total, 1 / (share ** 2 / freedom_a + (1 - share) ** 2 / freedom_b)


def _inverse_trigamma(values):
    """Newton's iteration of Smyth 2004."""
    found = 0.5 + 1 / values
    for _ in range(8):
        there = polygamma(1, found)
        found = found + there * (1 - there / values) / polygamma(2, found)
    return found


def effective_size(series: np.ndarray) -> np.ndarray:
    """Independent values whose mean varies as that of a series, over the last axis [..., n]."""
    return mean_statistics(series)[3]


def mean_interval(series: np.ndarray, *, level: float = 0.95, least_variance: float = 0.0
                  ) -> Interval:
    """Confidence interval of the mean of a series in time; see the module's top.

    Measured over AR(1) series of 22, 26 and 132 frames with autocorrelations to 0.97, and over net
    wins of equals: see `simulation`.

    Args:
        series: [n] values in order of time.
        least_variance: see `mean_statistics`.
    Raises:
        ValueError: fewer than 8 values, or NaN.
    """
    series = np.asarray(series, np.float64).ravel()
    if len(series) < MIN_FRAMES:
        raise ValueError(f"an interval needs at least {MIN_FRAMES} frames, got {len(series)}: their"
                         " autocorrelation cannot be estimated; hold out more frames")
    if not np.isfinite(series).all():
        raise ValueError("the series holds NaN or infinite values; look for NaN embeddings")
    mean, error, freedom, size = (float(x) for x in mean_statistics(
        series, least_variance=least_variance))
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
