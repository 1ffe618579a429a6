"""Numbers as people read them."""

import math


def format_count(count: float) -> str:
    """Return `2121000000` as `2.12B`."""
    return _scaled(count, ("", "K", "M", "B", "T"))


def format_bytes(num_bytes: float) -> str:
    """Return `6010000000` as `6.01 GB`."""
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 1000 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{value:.0f}{units[0]}" if power == 0 else f"{value:.3g}{units[power]}"


def perplexity(loss: float) -> float:
    """Return `exp(loss)`, infinite where that is beyond what a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
