"""Pictures of validation loss over tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intervals import Interval, mean_interval, paired_difference
from study_results import ALL_DOMAINS

from upcycled_moe.common.pictures import new_figure, save_png


# Line styles go round before colours do, so that many methods stay apart without colour too.
STYLES = ("-", "--", ":", "-.")
# Nats from the baseline at the end: methods further away do not set the scale, or all others would be one line.
NEAR = 0.03


def draw_losses(found: Mapping[str, Any], baseline: str, parent: str, path: Path) -> Path:
    """Draw the loss of all methods from one parent, and how it differs from the baseline, over tokens.

    Bars, and the band around the baseline, are 95 % intervals over seeds.
    """
    figure = new_figure(height=5.0, width=12.0)
    losses, differences = figure.subplots(1, 2)
    methods = found["methods"]
    losses.axhline(found["loss"][ALL_DOMAINS], color="#888888", linewidth=0.8, label="parent")
    shown: tuple[list[float], list[float]] = [], []
    for number, (name, method) in enumerate(methods.items()):
        style = {"color": f"C{number % 10}", "linestyle": STYLES[number % len(STYLES)], "linewidth": 1.4}
        tokens, intervals = _over_tokens(method["runs"], None)
        losses.plot(tokens, _means(intervals), label=method["title"], **style)
        is_near = abs(method["difference"][ALL_DOMAINS]["mean"]) < NEAR
        shown[0].extend(_means(intervals) if is_near else [])
        if name == baseline:
            # The bands of the others would lie on it: most of the spread is of the text, which all share.
            _draw_band(losses, tokens, intervals, style["color"])
            continue
        tokens, intervals = _over_tokens(method["runs"], methods[baseline]["runs"])
        # Side by side, so that all can be seen.
        moved = [count + number / len(methods) * (tokens[0] / 2) for count in tokens]
        widths = [interval.half_width or 0.0 for interval in intervals]
        differences.errorbar(moved, _means(intervals), widths, elinewidth=0.7, **style)
        shown[1].extend(_means(intervals) if is_near else [])
    differences.axhline(0.0, color="#888888", linewidth=0.8)
    losses.set(title=f"Parent {parent}: validation loss", xlabel="tokens", ylabel="nats per token")
    differences.set(title=f"less {methods[baseline]['title']}, paired by seed", xlabel="tokens")
    _limit(losses, [*shown[0], found["loss"][ALL_DOMAINS]])
    _limit(differences, [*shown[1], 0.0])
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    save_png(figure, path)
    return path


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


def _draw_band(axes, tokens: list[int], intervals: list[Interval], color: str) -> None:
    low = [interval.mean - (interval.half_width or 0.0) for interval in intervals]
    high = [interval.mean + (interval.half_width or 0.0) for interval in intervals]
    axes.fill_between(tokens, low, high, color=color, alpha=0.12, linewidth=0)


def _limit(axes, values: list[float]) -> None:
    """Let the axis show `values`, with a margin for their intervals."""
    margin = 0.25 * (max(values) - min(values)) or 0.01
    axes.set_ylim(min(values) - margin, max(values) + margin)
