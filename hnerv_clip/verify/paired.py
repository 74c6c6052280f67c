"""Two settings compared over the same seeds: a difference, its interval, and what may be said.

What is estimated: the mean difference, over all training seeds, for the frames and videos at hand;
with `over="videos"`, over all videos of which these are a sample. The interval is Student's t of
the paired differences, valid where these are about normal and independent, as seeds are. It is
never cut at the limits of a measure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Paired:
    """A paired difference a - b.

    difference: its mean. low, high: 95% interval, NaN for one pair. p: two-sided, of no
    difference. p_equivalent: of a difference of `margin` or more, by two one-sided tests
    (Schuirmann 1987), NaN without a margin. values: the differences. over: seeds or videos.
    """

    difference: float
    low: float
    high: float
    p: float
    p_equivalent: float
    margin: float
    values: np.ndarray
    over: str

    @property
    def n(self) -> int:
        """Pairs."""
        return len(self.values)

    @property
    def outcome(self) -> str:
        """`higher`, `lower`, `equivalent` (within the margin), or `cannot tell`."""
        if self.p_equivalent < 0.05:
            return "equivalent"
        if self.p < 0.05:
            return "higher" if self.difference > 0 else "lower"
        return "cannot tell"

    def words(self, unit: str = "", digits: int = 2) -> str:
        """`+0.07 dB [+0.02, +0.12], 3 paired seeds`; one pair goes without the interval."""
        what = self.over if self.n > 1 else self.over.removesuffix("s")
        return f"{self.interval(unit, digits)}, {self.n} paired {what}"

    def interval(self, unit: str = "", digits: int = 2) -> str:
        """`+0.07 dB [+0.02, +0.12]`, likewise."""
        unit = f" {unit}" if unit else ""
        interval = f" [{self.low:+.{digits}f}, {self.high:+.{digits}f}]" \
            if np.isfinite(self.low) else ""
        return f"{self.difference:+.{digits}f}{unit}{interval}"

    def sentence(self, unit: str = "", digits: int = 2) -> str:
        """What may be said: a direction, equivalence within the margin, or that it is open."""
        margin = f"{self.margin:.{digits}f}{f' {unit}' if unit else ''}"
        said = {"higher": "higher", "lower": "lower",
                "equivalent": f"no difference beyond {margin}",
                "cannot tell": "not decided"}[self.outcome]
        return f"{said} ({self.words(unit, digits)})"


def compare_paired(a: pd.Series, b: pd.Series, *, margin: float = np.nan, over: str = "seeds"
                   ) -> Paired:
    """Compare a measure of two settings over what both were run with.

    Args:
        a, b: values indexed by what pairs them: seed, or (video, seed). Pairs of which one is
            missing or NaN are left out.
        margin: differences smaller than this count as none; state it before looking.
        over: `seeds`, each pair a unit; or `videos`, whose means over seeds are the units (the
            index then begins with the video).
    Raises:
        ValueError: no pair, a pair twice, or another `over`.
    """
    if over not in ("seeds", "videos"):
        raise ValueError(f"over={over!r} is unknown; use seeds or videos")
    for values in (a, b):
        if values.index.has_duplicates:
            twice = values.index[values.index.duplicated()][0]
            raise ValueError(f"{twice} is there twice; give one value a pair")
    differences = (a - b).dropna()
    if differences.empty:
        raise ValueError(f"no pair in common: {list(a.index)} and {list(b.index)}; compare runs "
                         "of equal seeds")
    if over == "videos":
        differences = differences.groupby(level=0).mean()
    values = differences.to_numpy(float)
    if len(values) == 1:
        nan = np.nan
        return Paired(values[0], nan, nan, nan, nan, margin, values, over)
    mean, error = values.mean(), max(stats.sem(values), 1e-12)
    reach = stats.t.ppf(0.975, len(values) - 1) * error
    tails = stats.t.sf([(margin - mean) / error, (margin + mean) / error], len(values) - 1)
    return Paired(mean, mean - reach, mean + reach,
                  float(2 * stats.t.sf(abs(mean) / error, len(values) - 1)),
                  float(tails.max()), margin, values, over)
