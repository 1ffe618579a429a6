"""Pictures of a run's routing.

Dimensions: L MoE layers, E experts to choose from, N logs or probes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...common.pictures import new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lines of more layers than so many are told apart by a scale of colours.
MAX_LEGEND = 8
# Colours go so far: one expert that gets far more must not make all others look balanced.
MAX_RELATIVE_LOAD = 4.0


def draw_loads(
    layers: Sequence[int],
    loads: Sequence[Sequence[float]],
    steps: Sequence[int],
    violations: Sequence[Sequence[float]],
) -> "Figure":
    """Return a picture of the loads at the last log, and of how far each layer was from balance at all logs.

    Args:
        layers: index of each MoE layer in the model [L].
        loads: share of the selections that each expert got [L, E].
        steps: of the logs [N].
        violations: `max_violation` [N, L].
    """
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    relative = np.array(loads, dtype=float) * len(loads[0])  # [L, E], 1 if balanced
    figure = new_figure(height=2.6 + min(max(0.16 * len(layers), 2.2), 9.0))
    top, bottom = figure.subplots(2, 1, height_ratios=[max(0.16 * len(layers), 2.2), 2.2])

    colors = colormaps["coolwarm"].with_extremes(bad="black")
    largest = float(relative.max())
    busiest_layer = layers[int(relative.max(axis=1).argmax())]
    highest = min(max(2.0, largest), MAX_RELATIVE_LOAD)
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=highest)
    image = top.imshow(
        np.ma.masked_where(~(relative > 0), relative), cmap=colors, norm=norm, aspect="auto", interpolation="nearest"
    )
    top.set_title(
        f"Load of each expert in the log of step {steps[-1]} (black: no token; largest: {largest:.2g} × the balanced "
        f"one, in layer {busiest_layer})",
        loc="left",
        fontsize="medium",
    )
    top.set(xlabel="expert", ylabel="layer")
    ticks = range(0, len(layers), -(-len(layers) // 24))
    top.set_yticks(ticks, [str(layers[tick]) for tick in ticks])
    top.xaxis.get_major_locator().set_params(integer=True)
    extend = "max" if largest > highest else "neither"
    bar = figure.colorbar(image, ax=top, label="times the balanced load", pad=0.02, extend=extend)
    bar.set_ticks([0, 0.5, 1, highest], labels=["0", "0.5", "1", f"{highest:.2g}"])

    _draw_lines(figure, bottom, layers, steps, violations)
    bottom.set_title("Largest load of a layer, times the balanced one, minus 1", loc="left", fontsize="medium")
    bottom.set(xlabel="optimizer steps", ylabel="max_violation", ylim=(0, None))
    return figure


def draw_saturation(layers: Sequence[int], steps: Sequence[int], saturations: Sequence[Sequence[float]]) -> "Figure":
    """Return a picture of the shares [N, L] of the final selections that were made at each probe already."""
    figure = new_figure(height=3.6)
    axes = figure.subplots()
    _draw_lines(figure, axes, layers, steps, saturations)
    axes.set_title("Router saturation: share of the final selections made already", loc="left")
    axes.set(xlabel="optimizer steps", ylabel="saturation", ylim=(0, 1.02))
    return figure


def _draw_lines(
    figure: "Figure", axes: "Axes", layers: Sequence[int], steps: Sequence[int], values: Sequence[Sequence[float]]
) -> None:
    """Draw a line for each layer through `values` [N, L], from dark to light with depth, and their mean."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    by_layer = np.array(values, dtype=float).T  # [L, N]
    scale = ScalarMappable(Normalize(layers[0], max(layers[-1], layers[0] + 1)), colormaps["viridis"])
    marker = "o" if len(steps) < 30 else None
    for layer, line in zip(layers, by_layer, strict=True):
        axes.plot(steps, line, color=scale.to_rgba(layer), linewidth=1, marker=marker, markersize=3, label=str(layer))
    if len(layers) > 1:
        axes.plot(steps, by_layer.mean(axis=0), color="#d62728", linewidth=2, linestyle="--", label="mean")
    axes.spines[["top", "right"]].set_visible(False)
    if len(layers) > MAX_LEGEND:
        figure.colorbar(scale, ax=axes, label="layer (red: mean)", pad=0.02)
    else:
        axes.legend(title="layer", frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
