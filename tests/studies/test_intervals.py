"""Means over seeds and paired differences, against numbers worked out by hand."""

import math

import pytest
from intervals import MAX_SEEDS, Interval, holm, mean_interval, p_value, paired_difference


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


def test_p_value_is_the_level_where_the_interval_ends():
    # Each list has the mean and the standard error of its quantile, with 1, 2, 3 and 20 degrees of freedom.
    for count in (2, 3, 4, 21):
        values = [float(number) for number in range(count)]
        interval = mean_interval(values)
        moved = [value - interval.mean + interval.half_width for value in values]
        assert p_value(moved) == pytest.approx(0.05, abs=1e-4)
        assert p_value([-value for value in moved]) == pytest.approx(0.05, abs=1e-4)


def test_p_value_by_hand():
    # t = mean / (s / sqrt(3)) = 4 / (2 / sqrt(3)); with two degrees of freedom p = 1 - t / sqrt(t² + 2).
    t = 4 / (2 / math.sqrt(3))
    assert p_value([2.0, 4.0, 6.0]) == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert p_value([-1.0, 1.0]) == 1.0
    assert p_value([0.0, 0.0]) == 1.0
    assert p_value([2.0]) is None


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
