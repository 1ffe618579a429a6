"""How fast routers change: the experts of a fixed text, from probe to probe.

Dimensions: B sequences of the probe, S their length, T = B * S tokens, K slots of a token, E experts, L MoE layers.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...common.blocks import collate_blocks
from ...common.files import replacing
from ...common.routing import selection_overlap


PROBE_FOLDER = "router_probes"
SATURATION_FILE = "router_saturation.json"
TEXT_FILE = "text.safetensors"
# What a block says: its tokens and, where documents do not see each other, where they begin.
TEXT_KEYS = ("input_ids", "position_ids")


def probe_text(blocks: Iterable[Mapping[str, Sequence[int]]], num_tokens: int) -> dict[str, torch.Tensor]:
    """Return the first of `blocks`, of equal length, that have `num_tokens`; a part of a longer one.

    That is `input_ids` and, if blocks have them, `position_ids` [B, S].
    """
    chosen: list[Mapping[str, Sequence[int]]] = []
    for block in blocks:
        chosen.append({name: block[name][:num_tokens] for name in TEXT_KEYS if name in block})
        if len(chosen) * len(chosen[0]["input_ids"]) >= num_tokens:
            break
    return {name: torch.tensor([block[name] for block in chosen]) for name in chosen[0]}


@torch.no_grad()
def select_experts(
    model: torch.nn.Module,
    text: Mapping[str, torch.Tensor],
    batch_size: int,
    device: torch.device | str,
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]] = collate_blocks,
) -> torch.Tensor:
    """Return the experts [L, T, K] of the tokens of a probe's text in evaluation mode, in as few bytes as hold E.

    Draws no random numbers and leaves the model as it was.

    Args:
        text: see [`probe_text`].
        collate: makes the batches of training, whose attention tells documents apart where `text` does.
    """
    was_training = model.training
    model.eval()
    parts = []
    blocks = [{name: rows[number].tolist() for name, rows in text.items()} for number in range(len(text["input_ids"]))]
    for begin in range(0, len(blocks), batch_size):
        batch = send_to_device(collate(blocks[begin : begin + batch_size]), device)
        # Nothing is predicted here.
        del batch["labels"]
        outputs = model(**batch, output_router_logits=True, use_cache=False, logits_to_keep=1)
        num_experts = outputs.router_logits[0].shape[-1]
        dtype = torch.uint8 if num_experts <= torch.iinfo(torch.uint8).max else torch.int16
        parts.append(torch.stack([selected.to("cpu", dtype) for selected in outputs.selected_experts]))
    model.train(was_training)
    return torch.cat(parts, dim=1)


class ProbeFolder:
    """The probes of a run on disk: the text, and a file for each step."""

    def __init__(self, output_dir: str | Path):
        self.folder = Path(output_dir, PROBE_FOLDER)

    def cut(self, last_step: int) -> None:
        """Remove the probes after `last_step`, from which a run goes on; after 0 all, and the text."""
        if last_step == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        for step in self.steps():
            if step > last_step:
                self._file(step).unlink()

    def steps(self) -> list[int]:
        """Return the steps of the probes, in their order."""
        matches = [re.fullmatch(r"step-(\d+)\.safetensors", path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match[1]) for match in matches if match)

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def read_text(self) -> dict[str, torch.Tensor] | None:
        """Return what [`probe_text`] chose, or None if there is none; earlier versions kept no `position_ids`."""
        file = self.folder / TEXT_FILE
        return load_file(file) if file.is_file() else None

    def write_text(self, text: dict[str, torch.Tensor]) -> None:
        """Keep what [`probe_text`] chose."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_whole(self.folder / TEXT_FILE, text)

    def read(self, step: int) -> torch.Tensor:
        """Return the selections [L, T, K] of the probe at `step`."""
        return load_file(self._file(step))["selected_experts"]

    def write(self, step: int, selected: torch.Tensor) -> None:
        """Keep the selections [L, T, K] of the probe at `step`.

        Raises:
            OSError: if they cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_whole(self._file(step), {"selected_experts": selected})


def _write_whole(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        with replacing(path) as partial:
            save_file(tensors, partial)
    except SafetensorError as error:
        # A full disk is one too.
        raise OSError(f"{path}: {error}") from error


def saturation(probes: ProbeFolder, final: torch.Tensor, num_experts: int) -> tuple[list[int], torch.Tensor]:
    """Return the steps of all probes [N] and the overlap [N, L] of each one's selections with `final` [L, T, K].

    Source: OLMoE (arXiv 2409.02060), router saturation.
    """
    steps = probes.steps()
    overlaps = [selection_overlap(probes.read(step), final, num_experts) for step in steps]
    return steps, torch.stack(overlaps) if steps else torch.empty(0, len(final))


def write_saturation(path: Path, layers: Sequence[int], steps: Sequence[int], values: torch.Tensor) -> None:
    """Write the saturation [N, L] at `steps` [N] of each of `layers`, as numbered in the model, and the mean."""
    content = {
        "steps": list(steps),
        "layers": {
            str(layer): [round(value, 6) for value in values[:, number].tolist()]
            for number, layer in enumerate(layers)
        },
        "mean": [round(value, 6) for value in values.mean(dim=1).tolist()],
    }
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
