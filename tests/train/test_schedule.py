"""Learning-rate multipliers, by value."""

import pytest

from upcycled_moe.train.schedule import learning_rate_multiplier


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1),
        (4, 0.5),
        (9, 1.0),
        (10, 1.0),
        (79, 1.0),
        (80, 0.316),
        (89, 0.316),
        (90, 0.316**2),
        (99, 0.316**2),
        (1000, 0.316**2),
    ],
)
def test_warm_up_then_constant_then_two_steps_down(step, expected):
    multiplier = learning_rate_multiplier(
        step, num_warmup_steps=10, num_training_steps=100, decay_points=[0.8, 0.9], decay_factor=0.316
    )
    assert multiplier == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0), (19, 0), (20, 0.1), (29, 1.0), (79, 1.0), (80, 0.316)])
def test_the_warm_up_follows_the_steps_that_hold_the_weights(step, expected):
    multiplier = learning_rate_multiplier(
        step,
        num_warmup_steps=10,
        num_training_steps=100,
        decay_points=[0.8, 0.9],
        decay_factor=0.316,
        num_held_steps=20,
    )
    assert multiplier == pytest.approx(expected)


def test_without_warm_up_or_decay_it_is_constant():
    multipliers = {
        learning_rate_multiplier(step, num_warmup_steps=0, num_training_steps=10, decay_points=[], decay_factor=0.316)
        for step in range(12)
    }
    assert multipliers == {1.0}
