import numpy as np
import pytest

from upcycled_moe.overoptimization.bootstrap import (
    Interval,
    interval_of_largest,
    percentile_interval,
    resample_weights,
    seed_errors,
)


def test_weights_are_draws_with_replacement():
    weights = resample_weights(7, 500, np.random.default_rng(0))
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_array_equal(weights * 7, np.round(weights * 7))
    # 1 − (1 − 1/7)^7 of the prompts are in a resample
    assert (weights > 0).mean() == pytest.approx(1 - (6 / 7) ** 7, abs=0.02)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(1).normal(size=40)
    first, again, other = (
        percentile_interval(resample_weights(40, 300, np.random.default_rng(seed)) @ values) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_intervals_cover_the_true_mean():
    """In 19 of 20 tables, a little less for few prompts."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        values = generator.exponential(size=60)
        interval = percentile_interval(resample_weights(60, 300, generator) @ values)
        covered += interval.low <= 1 <= interval.high
    assert 0.90 <= covered / 400 <= 0.98


def false_alarms(naive):
    """How often a drop is seen where all means are the same, in 300 tables of 60 prompts and 10 points."""
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        values = generator.normal(size=(60, 10))
        means, resampled = values.mean(axis=0), resample_weights(60, 300, generator) @ values
        one = percentile_interval(resampled[:, means.argmax()]) if naive else interval_of_largest(means, resampled)
        alarms += one.low > 0
    return alarms / 300


def test_the_largest_of_many_raises_no_false_alarm():
    assert false_alarms(naive=True) > 0.15
    assert false_alarms(naive=False) < 0.06


@pytest.mark.parametrize("num_seeds", [(2, 2), (3, 3), (2, 6)])
def test_other_seeds_of_one_method_raise_no_false_alarm(num_seeds):
    generator = np.random.default_rng(0)
    weights = resample_weights(60, 300, generator)
    alarms = np.zeros(2)
    for _ in range(300):
        ours, theirs = (
            generator.normal(size=(number, 1)) + generator.normal(size=(number, 60)) for number in num_seeds
        )
        over_prompts = weights @ (ours.mean(axis=0) - theirs.mean(axis=0))
        over_seeds = over_prompts + seed_errors(ours.mean(axis=1), theirs.mean(axis=1), 300, generator)
        intervals = map(percentile_interval, (over_prompts, over_seeds))
        alarms += [not interval.low <= 0 <= interval.high for interval in intervals]
    assert alarms[0] / 300 > 0.5
    assert alarms[1] / 300 < 0.08


def test_errors_of_many_seeds_are_those_of_their_means():
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=4000), generator.normal(size=1000)
    errors = seed_errors(ours, theirs, 20_000, generator)
    assert errors.std() == pytest.approx(np.sqrt(1 / 4000 + 1 / 1000), rel=0.05)
    assert not seed_errors(np.ones(2), np.ones(3), 10, generator).any()


def test_the_interval_of_the_largest_has_it():
    values = np.array([0.1, 0.5, 0.0])
    resampled = values + np.random.default_rng(0).normal(size=(2000, 3)) * [0.01, 0.01, 0.0]
    interval = interval_of_largest(values, resampled)
    # |N(0, 0.01)|, the larger of two: its 95th percentile is 2.24 standard deviations.
    assert interval.low == pytest.approx(0.5 - 0.0224, abs=0.002)
    assert interval.high == pytest.approx(0.5 + 0.0224, abs=0.002)


@pytest.mark.parametrize(("values", "expected"), [([-0.3, 0.0], 0.0), ([0.2, 0.0], 0.2)])
def test_means_without_error_are_known(values, expected):
    assert interval_of_largest(np.array(values), np.tile(values, (100, 1))) == Interval(expected, expected)
