"""Axes: from numbers to places, ticks at round numbers, and numbers as text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


MISSING = "–"  # an en dash, where there is no number
# An axis spans at least this share of its largest number: less is rounding, and shows as a flat line.
SMALLEST_SPAN = 1e-3
# And this share to both sides of values that are all equal.
EQUAL_SPAN = 0.1

_MAX_DECIMALS = 5


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, drawn from `start` to `end`, with `ticks` at round numbers `step` apart."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    step: float

    def place(self, value: float) -> float:
        """Return where `value` is drawn."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def labels(self) -> list[tuple[float, str]]:
        """Return place and text of each tick, all with as many decimals as the step needs."""
        decimals = next((digits for digits in range(_MAX_DECIMALS + 1) if _is_whole(self.step * 10**digits)), None)
        texts = [_scientific(tick, 1) if decimals is None else f"{tick:,.{decimals}f}" for tick in self.ticks]
        return [(self.place(tick), _with_minus(text)) for tick, text in zip(self.ticks, texts, strict=True)]


def value_axis(values: Iterable[float | None], start: float, end: float, num_steps: int = 4) -> Axis:
    """Return an axis for `values` that ends at ticks."""
    low, high = limits(values)
    step = _round_step((high - low) / num_steps)
    # A limit that is a tick but for rounding adds no step.
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    ticks = tuple(number * step for number in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], start, end, ticks, step)


def index_axis(indices: Iterable[int], start: float, end: float, max_ticks: int = 9) -> Axis:
    """Return an axis for whole numbers such as layers, with room at its ends for the markers."""
    indices = sorted(indices)
    low, high = indices[0], indices[-1]
    step = math.ceil(_round_step(max((high - low) / max_ticks, 1)))
    margin = max((high - low) * 0.02, 0.5 if low == high else 0)
    return Axis(low - margin, high + margin, start, end, tuple(range(low, high + 1, step)), step)


def limits(values: Iterable[float | None]) -> tuple[float, float]:
    """Return the lowest and highest of `values`, far enough apart to draw; from 0 if they come near to it."""
    numbers = [value for value in values if value is not None]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    if 0 < low < 0.5 * high:
        low = 0.0
    if -0.5 * abs(low) < high < 0:
        high = 0.0
    size = max(abs(low), abs(high))
    if size == 0:
        return 0.0, 1.0
    if low == high:
        return low - EQUAL_SPAN * size, high + EQUAL_SPAN * size
    missing = max(SMALLEST_SPAN * size - (high - low), 0) / 2
    return low - missing, high + missing


def format_number(value: float | None) -> str:
    """Return `value` with three significant digits, as a table shows it."""
    if value is None:
        return MISSING
    if value == 0 or (isinstance(value, int) and abs(value) < 1_000_000):
        return _with_minus(f"{value:,}") if value else "0"
    if not 1e-4 <= abs(value) < 1e6:
        return _with_minus(_scientific(value, 2))
    return _with_minus(f"{value:,.{_decimals(value)}f}")


def format_like(value: float, largest: float) -> str:
    """Return `value` with as many decimals as three digits of `largest` have, so that a grid of numbers is even."""
    decimals = _decimals(largest)
    return _with_minus(f"{value:.{decimals}f}" if decimals <= _MAX_DECIMALS else _scientific(value, 0))


def _decimals(value: float) -> int:
    """Return after how many decimals `value`, rounded to them, has three significant digits."""
    return max(2 - int(f"{value:.2e}".partition("e")[2]), 0)


def _round_step(span: float) -> float:
    """Return the number 1, 2, 2.5 or 5 times a power of ten that is not less than `span`, but for rounding."""
    power = 10.0 ** math.floor(math.log10(span))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span * (1 - 1e-6))


def _scientific(value: float, decimals: int) -> str:
    """Return e.g. `1.5e-7`; 0 as it is."""
    mantissa, _, exponent = f"{value:.{decimals}e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _is_whole(value: float) -> bool:
    """Return whether `value`, above zero, is a whole number but for rounding."""
    return abs(value - round(value)) < 1e-6 * value


def _with_minus(text: str) -> str:
    return text.replace("-", "−")
