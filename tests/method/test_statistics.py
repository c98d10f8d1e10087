from __future__ import annotations

import numpy as np
import pytest

from benchmarks.method.statistics import describe, interval, sign_flip


def test_six_seeds_that_agree_have_the_least_probability():
    assert sign_flip(np.full(6, 0.01)) == 2 / 64
    assert sign_flip(-np.arange(1.0, 7.0)) == 2 / 64


def test_a_sign_flip_counts_every_mean_as_far_from_zero():
    # Means of (+-1 +-2 +-3) / 3 that are as large as 4/3: 1 2 3 = 6 and -1 2 3 = 4, and both negated.
    assert sign_flip(np.array([-1.0, 2.0, 3.0])) == 4 / 8
    assert sign_flip(np.zeros(4)) == 1.0
    assert sign_flip(np.array([0.5])) == 1.0


def test_the_interval_of_equal_differences_has_no_width():
    assert interval(np.full(6, 0.25)) == (0.25, 0.25)


def test_the_interval_of_two_values_is_that_of_all_four_resamples():
    # Means 0, 1/2, 1/2 and 1.
    low, high = interval(np.array([0.0, 1.0]))
    assert low == pytest.approx(np.quantile([0, 0.5, 0.5, 1], 0.025))
    assert high == pytest.approx(np.quantile([0, 0.5, 0.5, 1], 0.975))


def test_resampling_by_chance_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(0.3, 1.0, 200)
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_a_description_has_all_of_it():
    found = describe([0.01, 0.02, 0.03, 0.01, 0.02, 0.03])
    assert found.mean == pytest.approx(0.02) and found.count == 6 and found.p == 2 / 64
    assert 0.01 < found.low < 0.02 < found.high < 0.03


@pytest.mark.parametrize("bad", [[], [0.1, float("nan")]])
def test_differences_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="differences: got"):
        describe(bad)


def test_too_many_to_flip_are_refused():
    with pytest.raises(ValueError, match="values: got 21, expected at most 20"):
        sign_flip(np.ones(21))
