"""The picture of the curves: gold, and each model's own score, against how far the choice can move the policy."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..common.pictures import new_figure, save_png
from .measures import Curve
from .results import Results


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, but their yellow, which is pale on white: the colour-blind can tell them apart.
_COLORS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_ORACLE = "gold itself"
_ORACLE_COLOR = "#8a929e"
# The second round of colours has dashes.
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))
_MARKERS = "osD^vPX"
_MAX_LABELS = 10


def write_plot(results: Results, path: Path) -> None:
    """Write the picture of `results` as PNG.

    Raises:
        OSError: if it cannot be written.
    """
    figure = new_figure(height=5.4, width=11.0)
    left, right = figure.subplots(1, 2, sharex=True)
    _draw_oracle(left, results)
    for number, model in enumerate(results.models.values()):
        _draw(left, results, model.gold, number)
        _draw(right, results, model.proxy, number)
    _finish(left, results, "Gold: what the choice is worth", "gold, standard deviations within prompts")
    _finish(right, results, "Proxy: what the model that chooses says", "own score, standard deviations within prompts")
    names = [_ORACLE, *results.models]
    # Matplotlib leaves those out of a legend that begin with an underscore.
    legend = figure.legend(left.lines[: len(names)], ["name"] * len(names), loc="outside lower center", ncols=4)
    legend.set_frame_on(False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(_plain(name))
    save_png(figure, path)


def _draw(axes: "Axes", results: Results, curve: Curve, number: int) -> None:
    color = _COLORS[number % len(_COLORS)]
    axes.fill_between(results.kl_upper_bounds, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
    axes.plot(
        results.kl_upper_bounds,
        curve.values,
        color=color,
        linestyle=_DASHES[number // len(_COLORS) % len(_DASHES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        linewidth=1.6,
    )


def _draw_oracle(axes: "Axes", results: Results) -> None:
    values = results.oracle.gold.values
    axes.plot(results.kl_upper_bounds, values, color=_ORACLE_COLOR, linestyle=":", linewidth=1.6)


def _finish(axes: "Axes", results: Results, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("upper bound of KL(best of n || policy), nats")
    axes.set_ylabel(label)
    axes.axhline(0, color="#dfe3e8", linewidth=1, zorder=0)
    axes.grid(axis="y", color="#eceff2", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    numbers = axes.secondary_xaxis("top")
    ticks = _labelled(results.numbers)
    numbers.set_xticks([results.kl_upper_bounds[results.numbers.index(n)] for n in ticks], [str(n) for n in ticks])
    numbers.tick_params(length=2, labelsize=8)
    numbers.spines["top"].set_visible(False)
    numbers.set_xlabel("n", fontsize=8)


def _labelled(numbers: list[int]) -> list[int]:
    """Return the numbers that get a label: powers of two, thinned from the smallest on, and the last."""
    powers = [n for n in numbers if n & (n - 1) == 0 and n < numbers[-1]][-_MAX_LABELS:]
    # The last would be written over a power close below it.
    return [n for n in powers if 4 * n <= 3 * numbers[-1]] + [numbers[-1]]


def _plain(text: str) -> str:
    """Return `text` for Matplotlib, which reads formulas between dollar signs."""
    return text.replace("$", r"\$")
