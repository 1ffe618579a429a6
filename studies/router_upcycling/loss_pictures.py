"""Pictures of validation loss over tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intervals import Interval, mean_interval, paired_difference
from study_settings import ALL_DOMAINS

from upcycled_moe.common.pictures import new_figure, save_png


# Line styles go round before colours do, so that many methods stay apart without colour too.
STYLES = ("-", "--", ":", "-.")
# Nats from the baseline at the end: methods further away are named below the picture, or all others would be one line.
NEAR = 0.03
# Of the distance between two evaluations: how far bars of different methods stand apart, all together.
SPREAD = 0.3


def draw_losses(found: Mapping[str, Any], baseline: str, parent: str, path: Path) -> Path:
    """Draw the loss of all methods from one parent, and how it differs from the baseline, over tokens.

    Bars, and the band around the baseline, are 95 % intervals over seeds.
    """
    figure = new_figure(height=5.4, width=12.0)
    losses, differences = figure.subplots(1, 2)
    methods = found["methods"]
    near = {name: method for name, method in methods.items() if abs(method["difference"][ALL_DOMAINS]["mean"]) < NEAR}
    losses.axhline(found["loss"][ALL_DOMAINS], color="#888888", linewidth=0.8, label="parent")
    shown: tuple[list[float], list[float]] = ([found["loss"][ALL_DOMAINS]], [0.0])
    for number, (name, method) in enumerate(near.items()):
        style = {"color": f"C{number % 10}", "linestyle": STYLES[number % len(STYLES)], "linewidth": 1.4}
        tokens, intervals = _over_tokens(method["runs"], None)
        losses.plot(tokens, _means(intervals), label=method["title"], **style)
        shown[0].extend(_means(intervals))
        if name == baseline:
            # The bands of the others would lie on it: most of the spread is of the text, which all share.
            _draw_band(losses, tokens, intervals, style["color"])
            shown[0].extend(_ends(intervals))
            continue
        tokens, intervals = _over_tokens(method["runs"], methods[baseline]["runs"])
        # Lines are where they are; bars stand side by side around that place, so that all can be seen.
        differences.plot(tokens, _means(intervals), **style)
        offset = ((number + 0.5) / len(near) - 0.5) * SPREAD * (tokens[-1] / max(len(tokens) - 1, 1))
        widths = [interval.half_width or 0.0 for interval in intervals]
        differences.errorbar(
            [count + offset for count in tokens],
            _means(intervals),
            widths,
            color=style["color"],
            linestyle="none",
            elinewidth=0.7,
        )
        shown[1].extend(_ends(intervals))
    differences.axhline(0.0, color="#888888", linewidth=0.8)
    losses.set(title=f"Parent {parent}: validation loss", xlabel="tokens", ylabel="nats per token")
    differences.set(title=f"less {methods[baseline]['title']}, paired by seed", xlabel="tokens")
    for axes in (losses, differences):
        # Numbers of tokens are long.
        axes.locator_params(axis="x", nbins=5)
    _limit(losses, shown[0])
    _limit(differences, shown[1])
    if far := [_final_loss(method) for name, method in methods.items() if name not in near]:
        figure.supxlabel(f"Not on this scale, at the end: {'; '.join(far)}.", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    save_png(figure, path)
    return path


def _final_loss(method: Mapping[str, Any]) -> str:
    loss, difference = (method[name][ALL_DOMAINS]["mean"] for name in ("loss", "difference"))
    return f"{method['title']} {loss:.3f} ({difference:+.3f})"


def _over_tokens(runs: Mapping[int, Any], baseline: Mapping[int, Any] | None) -> tuple[list[int], list[Interval]]:
    """Return the tokens of each evaluation, and the interval of the loss over seeds, or of its difference."""
    tokens = [point["tokens"] for point in next(iter(runs.values()))["curve"]]
    intervals = []
    for number in range(len(tokens)):
        values = {seed: run["curve"][number]["loss"][ALL_DOMAINS] for seed, run in runs.items()}
        if baseline is None:
            intervals.append(mean_interval(list(values.values())))
        else:
            others = {seed: run["curve"][number]["loss"][ALL_DOMAINS] for seed, run in baseline.items()}
            intervals.append(paired_difference(values, others))
    return tokens, intervals


def _means(intervals: list[Interval]) -> list[float]:
    return [interval.mean for interval in intervals]


def _ends(intervals: list[Interval]) -> list[float]:
    return [interval.mean + side * (interval.half_width or 0.0) for interval in intervals for side in (-1, 1)]


def _draw_band(axes, tokens: list[int], intervals: list[Interval], color: str) -> None:
    ends = _ends(intervals)
    low, high = ends[::2], ends[1::2]
    axes.fill_between(tokens, low, high, color=color, alpha=0.12, linewidth=0)


def _limit(axes, values: list[float]) -> None:
    """Let the axis show `values`, with a margin."""
    margin = 0.05 * (max(values) - min(values)) or 0.01
    axes.set_ylim(min(values) - margin, max(values) + margin)
