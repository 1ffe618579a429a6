"""What a run shows of its routing beside the log: a file, probes, pictures, and warnings."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers.integrations import TensorBoardCallback, WandbCallback

from ...common.pictures import INSTALL, can_draw, pixels, save_png
from ...common.routing import selection_overlap
from ...common.routing_log import ROUTING_LOG_FILE, append_routing, cut_routing, read_routing
from .collapse import CollapseWatch
from .pictures import draw_loads, draw_saturation
from .probes import (
    SATURATION_FILE,
    TEXT_KEYS,
    ProbeFolder,
    probe_text,
    saturation,
    select_experts,
    write_saturation,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .mixin import MonitoringMixin

# At the default, that many logs.
LOGS_PER_PROBE = 10


class RoutingView:
    """Follows the routing of a training run.

    * `routing.jsonl`: at each log the loads and all other figures of each layer.
    * `router_probes/`: at the start, every `router_probe_steps` and at the end the experts of a fixed text: evaluation
      text where there is some, else the first blocks of training. `router_saturation.json` follows from them.
    * `router_loads.png` and `router_saturation.png`, as often; also in TensorBoard and W&B where they are in use.
    * warnings of layers whose routing has collapsed.

    The first process writes; all take part in the forward passes of a probe, which draw no random numbers. A file that
    cannot be written is no reason to stop: the run says so once and goes on. What was written after the checkpoint
    that a run goes on from is removed.
    """

    def __init__(self, trainer: "MonitoringMixin"):
        self.trainer = trainer
        self.args = trainer.args
        self.layers = trainer.moe_layers
        self.output_dir = Path(self.args.output_dir)
        self.probes = ProbeFolder(self.output_dir)
        self._failed: set[str] = set()

    def begin(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Go on from what earlier parts of the run have left, and probe the start of a new one.

        Args:
            batch: the first of training.
        """
        state, args = self.trainer.state, self.args
        self._last_step = state.global_step
        every = args.router_probe_steps
        self._every = LOGS_PER_PROBE * state.logging_steps if every is None else every
        self._watch = None
        if args.router_collapse_threshold > 0:
            num_first_steps = args.router_warmup_steps + args.get_warmup_steps(state.max_steps)
            self._watch = CollapseWatch(args.router_collapse_threshold, num_first_steps)
        self._steps: list[int] = []
        self._violations: list[list[float]] = []
        self._loads: list[list[float]] | None = None
        self._drawn_step: int | None = None
        self._draws = False
        if self.trainer.is_world_process_zero():
            self._write(str(self.output_dir / ROUTING_LOG_FILE), self._read_earlier)
            self._write(str(self.probes.folder), lambda: self.probes.cut(self._last_step))
            self._draws = self._every > 0 and can_draw()
            if self._every > 0 and not self._draws:
                self._say(f"Matplotlib is not installed, so there are no pictures of the routing; {INSTALL}.")
        self._begin_probes(batch)

    def _read_earlier(self) -> None:
        path = self.output_dir / ROUTING_LOG_FILE
        self.output_dir.mkdir(parents=True, exist_ok=True)
        cut_routing(path, self._last_step)
        for entry in read_routing(path):
            self._steps.append(entry["step"])
            self._violations.append([layer["max_violation"] for layer in entry["layers"].values()])

    def _begin_probes(self, batch: Mapping[str, torch.Tensor]) -> None:
        self._text: dict[str, torch.Tensor] | None = None
        if not self._every or not self.args.router_probe_tokens:
            return
        self._first = self._last = None
        steps = []
        if self.trainer.is_world_process_zero():
            self._text, steps = self.probes.read_text(), self.probes.steps()
            if self._text is None or not steps:
                steps, self._text = [], self._choose_text(batch)
                self._write(str(self.probes.folder), lambda: self.probes.write_text(self._text))
            else:
                self._first, self._last = self.probes.read(steps[0]), self.probes.read(steps[-1])
        # All processes must run the same number of forward passes.
        self._text, self._probed_step = broadcast_object_list([self._text, steps[-1] if steps else None])
        if self._probed_step is None:
            self._probe(self._last_step)

    def _choose_text(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        eval_sets = self.trainer.eval_dataset
        if not isinstance(eval_sets, dict):
            rows = {name: batch[name].tolist() for name in TEXT_KEYS if name in batch}
            blocks = (dict(zip(rows, block, strict=True)) for block in zip(*rows.values(), strict=True))
            return probe_text(blocks, self.args.router_probe_tokens)
        # A block of each domain, then the next of each.
        blocks = (
            eval_sets[domain][number]
            for number in range(max(map(len, eval_sets.values())))
            for domain in eval_sets
            if number < len(eval_sets[domain])
        )
        return probe_text(blocks, self.args.router_probe_tokens)

    def _probe(self, step: int) -> dict[str, list[float]]:
        """Look at what the routers select now, and return by figure how that compares [L], in the first process."""
        trainer = self.trainer
        batch_size = self.args.per_device_eval_batch_size
        selected = select_experts(trainer.model, self._text, batch_size, self.args.device, trainer.data_collator)
        self._probed_step = step
        if not trainer.is_world_process_zero():
            return {}
        self._write(str(self.probes.folder), lambda: self.probes.write(step, selected))
        figures = {}
        if self._last is None:
            self._first = selected
        else:
            num_experts = trainer.model.config.num_routed_experts
            figures = {
                "change_rate": (1 - selection_overlap(self._last, selected, num_experts)).tolist(),
                "kept_from_start": selection_overlap(self._first, selected, num_experts).tolist(),
            }
        self._last = selected
        return figures

    def show(self, step: int, num_tokens: int, layers: dict[int, dict[str, Any]]) -> None:
        """Take the figures of a log; those of a probe, where one is due, are added to them.

        Args:
            num_tokens: tokens that the figures are over.
            layers: figures of each MoE layer, by its index in the model.
        """
        is_due = self._every > 0 and step // self._every > self._last_step // self._every
        self._last_step = step
        if is_due and self._text is not None:
            self._add_figures(self._probe(step), layers)
        if not self.trainer.is_world_process_zero():
            return
        path = self.output_dir / ROUTING_LOG_FILE
        self._write(str(path), lambda: append_routing(path, step, num_tokens, layers))
        self._steps.append(step)
        self._violations.append([layers[layer]["max_violation"] for layer in self.layers])
        self._loads = [layers[layer]["load"] for layer in self.layers]
        for line in self._watch.observe(step, num_tokens, layers) if self._watch else ():
            self._say(line)
        if is_due and self._draws:
            self._draw_loads()

    def _add_figures(self, figures: dict[str, list[float]], layers: dict[int, dict[str, Any]]) -> None:
        for name, values in figures.items():
            for layer, value in zip(self.layers, values, strict=True):
                layers[layer][name] = value

    def end(self) -> None:
        """Probe the last routers, and compare all earlier ones with them."""
        step = self.trainer.state.global_step
        if self._text is not None and self._probed_step != step:
            self._probe(step)
        if not self.trainer.is_world_process_zero():
            return
        if self._draws and self._loads is not None and self._drawn_step != self._last_step:
            self._draw_loads()
        if self._text is not None:
            self._write(str(self.output_dir / SATURATION_FILE), self._show_saturation)

    def _show_saturation(self) -> None:
        steps, values = saturation(self.probes, self._last, self.trainer.model.config.num_routed_experts)
        write_saturation(self.output_dir / SATURATION_FILE, self.layers, steps, values)
        if self._draws and len(steps) > 1:
            self._show_picture("router_saturation", draw_saturation(self.layers, steps, values.tolist()))

    def _draw_loads(self) -> None:
        figure = draw_loads(self.layers, self._loads, self._steps, self._violations)
        self._show_picture("router_loads", figure)
        self._drawn_step = self._last_step

    def _show_picture(self, name: str, figure: "Figure") -> None:
        path = self.output_dir / f"{name}.png"
        self._write(str(path), lambda: save_png(figure, path))
        step = self.trainer.state.global_step
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(f"train/{name}", pixels(figure), step, dataformats="HWC")
            elif isinstance(callback, WandbCallback) and callback._wandb is not None:
                image = callback._wandb.Image(pixels(figure))
                callback._wandb.log({f"train/{name}": image, "train/global_step": step})

    def _write(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if what not in self._failed:
                self._say(f"warning: {what} cannot be written: {error}; the run goes on without it.")
            self._failed.add(what)

    def _say(self, line: str) -> None:
        # Above the progress bar, where there is one.
        tqdm.write(f"train.py: {line}", file=sys.stderr)
