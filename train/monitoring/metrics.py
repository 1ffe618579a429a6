"""Router figures as the flat keys of a log."""

from collections.abc import Mapping
from typing import Any


LayerMetrics = Mapping[int, Mapping[str, Any]]


def router_log(layers: LayerMetrics) -> dict[str, float]:
    """Return the figures of each layer but the loads as `router/layer_NN/<figure>`.

    Args:
        layers: `RouterStatistics.metrics` of each MoE layer, by its index in the model.
    """
    return {
        f"router/layer_{layer_idx:02d}/{name}": value
        for layer_idx, metrics in layers.items()
        for name, value in metrics.items()
        if name != "load"
    }


def mean_over_layers(layers: LayerMetrics) -> dict[str, float]:
    """Return each figure but the loads as `router/<figure>`, the mean over layers."""
    names = [name for name in next(iter(layers.values())) if name != "load"]
    return {f"router/{name}": sum(metrics[name] for metrics in layers.values()) / len(layers) for name in names}
