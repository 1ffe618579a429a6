"""Axes and numbers as text."""

import pytest

from upcycled_moe.analysis.report.scales import format_like, format_number, index_axis, limits, value_axis


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.2, 1.9], ["0.0", "0.5", "1.0", "1.5", "2.0"]),
        ([0.91, 0.99], ["0.90", "0.92", "0.94", "0.96", "0.98", "1.00"]),
        ([-0.3, 0.1], ["−0.3", "−0.2", "−0.1", "0.0", "0.1"]),
        ([1200, 3900], ["0", "1,000", "2,000", "3,000", "4,000"]),
        ([0.0, 3.1e-17], ["0", "1.0e−17", "2.0e−17", "3.0e−17", "4.0e−17"]),
        ([None, None], ["0.00", "0.25", "0.50", "0.75", "1.00"]),
    ],
)
def test_axes_end_at_round_numbers_around_the_values(values, ticks):
    axis = value_axis(values, 100.0, 0.0)
    assert [text for _, text in axis.labels()] == ticks
    assert axis.labels()[0][0] == pytest.approx(100.0)
    assert axis.labels()[-1][0] == pytest.approx(0.0)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, 1e-9, 0.9999999])
def test_equal_values_lie_within_their_axis(value):
    axis = value_axis([value, value], 100.0, 0.0)
    assert 0.0 <= axis.place(value) <= 100.0
    assert len(axis.ticks) <= 7


def test_rounding_is_not_blown_up():
    low, high = limits([0.99999999, 1.0])
    assert (low + high) / 2 == pytest.approx(1.0)
    assert high - low == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("layers", "ticks"),
    [([0], [0]), ([5], [5]), ([0, 1], [0, 1]), (range(24), [0, 5, 10, 15, 20]), ([1, 3, 5], [1, 2, 3, 4, 5])],
)
def test_layers_are_whole_numbers(layers, ticks):
    axis = index_axis(layers, 0.0, 100.0)
    assert [text for _, text in axis.labels()] == [str(tick) for tick in ticks]
    assert all(0.0 < axis.place(layer) < 100.0 for layer in layers)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.5, "0.500"),
        (0.0999999, "0.100"),
        (0.99996, "1.00"),
        (-1.234, "−1.23"),
        (123.4, "123"),
        (4096, "4,096"),
        (2, "2"),
        (12345.6, "12,346"),
        (0.000012345, "1.23e−5"),
        (3.2e9, "3.20e9"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert format_number(value) == text


def test_numbers_of_a_grid_have_as_many_decimals():
    assert [format_like(value, 0.573) for value in (0.0067, 0.573, 0.1)] == ["0.007", "0.573", "0.100"]
    assert format_like(1.5, 12.0) == "1.5"
    assert [format_like(value, 4e-17) for value in (3.7e-17, 0.0)] == ["4e−17", "0"]
