"""Means and tests, by numbers worked out by hand or by other functions of scipy."""

import math

import pytest
from scipy import stats

from dynamixer.study.statistics import holm, paired, spread


def test_mean_and_deviation_by_hand():
    assert spread([70.0, 72.0, 74.0]) == (72.0, 2.0, 3)
    assert spread([70.0]) == (70.0, None, 1)


def test_a_paired_difference_by_hand():
    found = paired({0: 71.0, 1: 72.0, 2: 76.0, 7: 1.0}, {0: 70.0, 1: 70.0, 2: 73.0, 8: 2.0})  # 1, 2, 3 on common seeds
    t = 2 / (1 / math.sqrt(3))
    assert found.mean == 2
    assert found.seeds == 3
    assert found.p == pytest.approx(2 * stats.t.sf(t, 2))
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert found.sign == 0  # -0.48 to 4.48


def test_the_sign_needs_an_interval_without_zero():
    up = paired({0: 2.0, 1: 2.1, 2: 1.9}, {0: 0.0, 1: 0.0, 2: 0.0})
    down = paired({0: 0.0, 1: 0.0, 2: 0.0}, {0: 2.0, 1: 2.1, 2: 1.9})
    assert (up.sign, down.sign) == (1, -1)
    assert up.p == stats.ttest_1samp([2.0, 2.1, 1.9], 0).pvalue


def test_one_seed_is_no_test_and_none_is_nothing():
    assert paired({0: 2.0}, {0: 1.0, 1: 5.0}) == (1.0, None, None, None, 1)
    assert paired({0: 2.0}, {0: 1.0}).sign == 0
    assert paired({0: 2.0}, {1: 1.0}) is None


def test_pairs_that_all_say_the_same():
    assert paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}) == (1.0, 1.0, 1.0, 0.0, 2)
    assert paired({0: 2.0, 1: 3.0}, {0: 2.0, 1: 3.0}) == (0.0, 0.0, 0.0, 1.0, 2)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
