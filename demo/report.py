"""The demo's table and pictures, from the logs that training wrote."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.routing_log import ROUTING_LOG_FILE, read_routing


# Distinct also in greyscale and for the colour-blind.
COLORS = {"dense": "#555555", "vanilla upcycling": "#d95f02", "Router Upcycling": "#1b6ca8"}


@dataclass(frozen=True)
class TrainedModel:
    """A training run: its folder and its log, one dict an entry."""

    name: str
    folder: Path
    log: list[dict[str, Any]]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return steps and values of `key`, where it was logged."""
        entries = [entry for entry in self.log if key in entry]
        return [entry["step"] for entry in entries], [entry[key] for entry in entries]

    def last(self, key: str) -> float | None:
        """Return the last value of `key`, or None if it was never logged."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def loads(self) -> list[list[float]]:
        """Return the last load of each expert in each layer, shares of the selections."""
        layers: dict[str, dict[str, Any]] = {}
        for entry in read_routing(self.folder / ROUTING_LOG_FILE):
            layers = entry["layers"]
        return [figures["load"] for figures in layers.values()]


def read_run(name: str, folder: Path) -> TrainedModel:
    """Return the run in `folder`."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return TrainedModel(name, folder, state["log_history"])


def print_table(parent: TrainedModel, trained: list[TrainedModel]) -> None:
    """Print validation loss and the router's figures of each model."""
    from rich.console import Console
    from rich.table import Table

    merged: dict[str, Any] = {}
    for entry in trained[0].log:
        merged |= entry
    domains = sorted(match[1] for key in merged if (match := re.fullmatch(r"eval_(\w+)_perplexity", key)))
    table = Table(
        title="\nValidation loss (nats per token), perplexity by book, and the routers", title_justify="left"
    )
    table.add_column("Model", no_wrap=True)
    for column in ["Loss", *domains, "Load, most ÷ mean", "Entropy"]:
        table.add_column(column, justify="right", no_wrap=True)
    for model in [parent, *trained]:
        violation, entropy = model.last("router/max_violation"), model.last("router/entropy")
        table.add_row(
            model.name,
            f"{model.last('eval_loss'):.4f}",
            *(f"{model.last(f'eval_{domain}_perplexity'):.2f}" for domain in domains),
            "" if violation is None else f"{violation + 1:.2f}",
            "" if entropy is None else f"{entropy:.3f}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)


def write_plots(parent: TrainedModel, trained: list[TrainedModel], folder: Path) -> list[Path]:
    """Write the loss curves and the load of every expert as PNG and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [_plot_losses(parent, trained, folder / "loss.png"), _plot_loads(trained, folder / "expert_load.png")]


def _plot_losses(parent: TrainedModel, trained: list[TrainedModel], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    axes.axhline(parent.last("eval_loss"), color="#999999", linestyle=":", label="dense parent")
    for model in trained:
        steps, losses = model.series("eval_loss")
        axes.plot(steps, losses, color=COLORS[model.name], marker="o", markersize=3, label=model.name)
    axes.set(xlabel="optimizer steps after upcycling", ylabel="validation loss (nats per token)")
    axes.set_title("Validation loss", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _plot_loads(trained: list[TrainedModel], path: Path) -> Path:
    from matplotlib import pyplot as plt

    models = [model for model in trained if model.loads()]
    figure, all_axes = plt.subplots(1, len(models), figsize=(9, 3.2), layout="constrained", squeeze=False, sharey=True)
    highest = max(max(map(max, model.loads())) for model in models)
    for axes, model in zip(all_axes[0], models, strict=True):
        loads = model.loads()
        image = axes.imshow(loads, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        for layer, row in enumerate(loads):
            for expert, load in enumerate(row):
                color = "black" if load > 0.6 * highest else "white"
                axes.text(expert, layer, f"{load:.2f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_title(model.name, loc="left")
        axes.set(xlabel="expert", xticks=range(len(loads[0])), yticks=range(len(loads)))
    all_axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=all_axes[0], label=f"share of selections ({1 / len(loads[0]):.3g} if balanced)")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
