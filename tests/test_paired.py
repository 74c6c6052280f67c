"""Paired comparisons: against scipy, and what may be said of them."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hnerv_clip.verify.paired import compare_paired


def test_the_interval_is_student_s_of_the_differences():
    a = pd.Series([30.2, 30.4, 30.1, 31.0], index=[0, 1, 2, 7])
    b = pd.Series([30.3, 30.0, 29.9], index=[1, 0, 2])
    found = compare_paired(a, b, margin=0.5)
    reference = stats.ttest_rel(a[[0, 1, 2]], b[[0, 1, 2]])
    interval = reference.confidence_interval()
    assert found.n == 3 and found.p == pytest.approx(reference.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    tails = [stats.ttest_1samp(found.values, bound, alternative=side).pvalue
             for bound, side in ((0.5, "less"), (-0.5, "greater"))]
    assert found.p_equivalent == pytest.approx(max(tails))


def test_what_may_be_said():
    seeds, rng = range(5), np.random.default_rng(0)
    base = pd.Series(30 + rng.normal(0, 1, 5), seeds)
    noise = pd.Series([0.01, -0.01, 0.02, 0, -0.02], seeds)
    assert compare_paired(base + 1 + noise, base).outcome == "higher"
    assert compare_paired(base - 1 + noise, base).sentence("dB").startswith("lower (-1.00 dB [-1.")
    same = compare_paired(base + noise, base, margin=0.1)
    assert same.outcome == "equivalent" and "no difference beyond 0.10 dB" in same.sentence("dB")
    # Without a margin, nothing is ever said to be the same
    assert compare_paired(base + noise, base).outcome == "cannot tell"
    one = compare_paired(base[:1], base[:1] - 0.3, margin=0.1)
    assert one.outcome == "cannot tell" and one.words("dB") == "+0.30 dB, 1 paired seed"


def test_videos_are_the_unit_of_what_is_said_of_videos():
    index = pd.MultiIndex.from_product([["bunny", "bikes"], [0, 1, 2]])
    a = pd.Series([1, 1.1, 0.9, 3, 3.1, 2.9], index)
    found = compare_paired(a, a * 0, over="videos")
    assert found.n == 2 and found.words() == "+2.00 [-10.71, +14.71], 2 paired videos"


def test_what_does_not_pair():
    a = pd.Series([1.0], [0])
    with pytest.raises(ValueError, match="no pair in common"):
        compare_paired(a, pd.Series([1.0], [1]))
    with pytest.raises(ValueError, match="there twice"):
        compare_paired(pd.Series([1.0, 2.0], [0, 0]), a)
    with pytest.raises(ValueError, match="over='frames'"):
        compare_paired(a, a, over="frames")
