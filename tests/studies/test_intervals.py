"""Means over seeds and paired differences, against numbers worked out by hand."""

import pytest
from intervals import MAX_SEEDS, Interval, mean_interval, paired_difference


def test_mean_interval_of_three_values():
    # mean 4, standard deviation sqrt((4 + 0 + 4) / 2) = 2, t(2) = 4.3027: 4.3027 * 2 / sqrt(3).
    interval = mean_interval([2.0, 4.0, 6.0])
    assert interval.mean == 4.0
    assert interval.half_width == pytest.approx(4.96833, abs=1e-4)
    assert not interval.excludes_zero


def test_single_value_has_no_interval():
    assert mean_interval([3.0]) == Interval(3.0, None)
    assert not mean_interval([3.0]).excludes_zero


def test_quantiles_of_few_and_many_degrees_of_freedom():
    # Two values 0 and 2: standard error 1, so that the half width is the quantile itself.
    assert mean_interval([0.0, 2.0]).half_width == pytest.approx(12.7062)
    # Twenty degrees of freedom, the last of the table: t = 2.0860.
    values = [0.0] * 10 + [1.0] + [2.0] * 10
    assert len(values) == MAX_SEEDS
    assert mean_interval(values).half_width == pytest.approx(2.0860 * 1.0 / 21**0.5)


def test_paired_difference_ignores_what_both_share():
    baseline = {1: 3.0, 2: 5.0, 3: 4.0}
    values = {3: 3.8, 1: 2.9, 2: 4.7}
    # Differences -0.1, -0.3, -0.2: mean -0.2, standard deviation 0.1.
    interval = paired_difference(values, baseline)
    assert interval.mean == pytest.approx(-0.2)
    assert interval.half_width == pytest.approx(4.3027 * 0.1 / 3**0.5)
    assert not interval.excludes_zero
    assert paired_difference({1: 2.0, 2: 3.9}, {1: 3.0, 2: 4.9}).excludes_zero


def test_seeds_must_be_the_same():
    with pytest.raises(ValueError, match="seeds differ"):
        paired_difference({1: 2.0, 2: 3.0}, {1: 2.0, 3: 3.0})
