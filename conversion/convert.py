"""The conversion: a dense Qwen checkpoint goes in, a Mixture-of-Experts checkpoint comes out."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_upcycled_moe import ROUTERS

from ..common.routing import router_metrics
from .calibration import LayerActivations, best_device, calibrate, calibration_blocks
from .card import write_card
from .heads import coinciding_keys
from .plan import ConversionPlan, build_plan
from .recipe import ConversionRecipe
from .report import RouterReport, report_router
from .source import COMPANION_FILES, COMPANION_FOLDERS, DTYPES, DenseSource
from .writer import BUFFER_BYTES, Content, check_output, staged, write_text, write_weights


PROVENANCE_FILE = "upcycling.json"
PROVENANCE_FORMAT = 1
PACKAGES = ("upcycled-moe", "torch", "transformers", "safetensors", "datasets")


class Progress:
    """What a conversion tells while it runs; this one keeps silent."""

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Give a function to call with each advance towards `total`; `unit` is `bytes` or `layers`."""
        yield lambda advance: None

    def warn(self, message: str) -> None:
        """Tell of something that someone should act on."""


@dataclass(frozen=True)
class ConversionResult:
    """What was written, and what the fresh routers do (None without calibration text)."""

    folder: Path
    plan: ConversionPlan
    routers: list[RouterReport] | None


def convert(
    source: DenseSource,
    recipe: ConversionRecipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Convert `source` by `recipe` into the folder `out`, all or nothing.

    The same source, recipe and seed give the same bytes, whatever the shard size.

    Raises:
        SettingsError: if recipe, source and output do not fit; nothing is written then.
        OSError: if writing fails; nothing is left then.
    """
    out, progress = Path(out), progress or Progress()
    plan = build_plan(source, recipe)
    check_output(plan, out, overwrite)
    if not source.has_tokenizer:
        progress.warn(f"{source.name} has no tokenizer, so the result has none; put its files beside the weights.")
    if plan.config.num_experts_per_tok == 1 and plan.config.norm_topk_prob:
        progress.warn(
            "num_experts_per_tok=1: the weight of the only expert is always 1, so the language-modeling loss gives "
            "the routers no gradient; use 2, or train with norm_topk_prob=False."
        )
    contents, reports = initial_routers(plan, progress)
    # Hashing reads what copying has just brought into memory, on another core.
    with staged(out) as folder, _in_background(_hash_files, source.weight_files) as hashes:
        with progress.task("Writing", plan.num_bytes, "bytes") as advance:
            write_weights(plan, contents, folder, advance)
        _copy_companions(source, folder)
        provenance = _provenance(plan, reports, hashes.result())
        write_text(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")
        write_card(folder, plan, reports)
        # Last: without its configuration nothing loads. It brings the code of the model along.
        plan.config.save_pretrained(folder)
    return ConversionResult(out, plan, reports)


def initial_routers(plan: ConversionPlan, progress: Progress) -> tuple[dict[str, Content], list[RouterReport] | None]:
    """Return the content of every router tensor by name, and what the routers do on the calibration text, if any."""
    recipe, layers = plan.recipe, plan.config.moe_layers
    contents: dict[str, Content] = {}
    if not recipe.calibration_data:
        for layer_idx in layers:
            contents |= _named(layer_idx, plan.router.tensors(layer_idx, None))
        return contents, None
    reports = []
    blocks = calibration_blocks(plan.source, recipe)
    with progress.task("Calibrating", max(layers) + 1, "layers") as advance:
        for activations in calibrate(
            plan.source,
            blocks,
            layers,
            attended=plan.router.attended_keys,
            batch_size=recipe.calibration_batch_size,
            device=best_device(),
            on_layer=lambda: advance(1),
        ):
            tensors = plan.router.tensors(activations.layer, activations)
            tensors, report = _scaled_and_measured(plan, activations, tensors)
            contents |= _named(activations.layer, tensors)
            reports.append(report)
    _warn_of_degenerate_routers(plan, reports, progress)
    return contents, reports


def _named(layer_idx: int, tensors: dict[str, Content]) -> dict[str, Content]:
    return {f"model.layers.{layer_idx}.mlp.gate.{name}": content for name, content in tensors.items()}


@torch.no_grad()
def _scaled_and_measured(
    plan: ConversionPlan, layer: LayerActivations, contents: dict[str, Content]
) -> tuple[dict[str, Content], RouterReport]:
    """Return the router with its logits scaled as the recipe asks, and what it does on the text that `layer` saw."""
    target, top_k = plan.recipe.target_logit_std, plan.config.num_experts_per_tok
    scores = _router_scores(plan, layer, contents)
    measured = router_metrics(scores, top_k)["logit_std"]
    if target is not None and measured > 0:
        name = plan.router.scaled_tensor
        contents = contents | {name: contents[name] * (target / measured)}
        scores = _router_scores(plan, layer, contents)
    keys = contents.get("keys")
    return contents, report_router(
        layer.layer,
        scores,
        top_k,
        unscaled_logit_std=measured,
        coinciding_keys=None if keys is None else coinciding_keys(keys),
    )


def _router_scores(plan: ConversionPlan, layer: LayerActivations, contents: dict[str, Content]) -> torch.Tensor:
    """Return the logits [T, E] of the text that `layer` saw, by the router as it will be read from the file."""
    router = ROUTERS[plan.config.router_type](plan.config).eval()
    dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in plan.tensors}
    for name, parameter in router.named_parameters():
        content = contents[name]
        value = content if isinstance(content, torch.Tensor) else content.load()
        written = value.to(dtypes[f"model.layers.{layer.layer}.mlp.gate.{name}"])
        parameter.data.copy_(written.reshape(parameter.shape))
    router.to(layer.ffn_inputs[0].device)
    return torch.cat([router.score(tokens.float()) for tokens in layer.ffn_inputs])


def _warn_of_degenerate_routers(plan: ConversionPlan, reports: list[RouterReport], progress: Progress) -> None:
    coinciding = [report for report in reports if report.coinciding_keys]
    if coinciding:
        is_grouped_query = plan.config.num_key_value_heads < plan.config.num_attention_heads
        reason = (
            "heads that share a key-value head have the same mean key; use key_statistic='attended'"
            if is_grouped_query and plan.recipe.key_statistic == "mean"
            else "there are fewer different groups of heads than keys; another num_routers or heads_per_router helps"
        )
        progress.warn(
            f"Keys coincide in {len(coinciding)} of {len(reports)} layers (layer {coinciding[0].layer}: "
            f"{coinciding[0].coinciding_keys} of {plan.config.num_router_keys}), so their experts compete for the "
            f"same tokens: {reason}."
        )
    dead = [report for report in reports if report.dead_experts]
    if dead:
        progress.warn(
            f"Experts get no token in {len(dead)} of {len(reports)} layers (most: "
            f"{max(report.dead_experts for report in dead)} of {plan.config.num_experts}); training may wake them, "
            "a larger router_aux_loss_coef helps."
        )


def _copy_companions(source: DenseSource, folder: Path) -> None:
    for name in COMPANION_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    for name in COMPANION_FOLDERS:
        if (source.folder / name).is_dir():
            shutil.copytree(source.folder / name, folder / name)


@contextmanager
def _in_background(function: Callable, *arguments: Any) -> Iterator[Future]:
    """Run `function(*arguments, stop)` on another thread; an error in the body sets the event `stop`."""
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as executor:
        try:
            yield executor.submit(function, *arguments, stop)
        except BaseException:
            stop.set()
            raise


def _hash_files(paths: list[Path], stop: threading.Event) -> dict[str, str]:
    """Return the SHA-256 of each file by its name; breaks off when `stop` is set."""
    hashes = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not stop.is_set() and (data := file.read(BUFFER_BYTES)):
                digest.update(data)
        hashes[path.name] = digest.hexdigest()
    return hashes


def _provenance(plan: ConversionPlan, reports: list[RouterReport] | None, hashes: dict[str, str]) -> dict[str, Any]:
    """Return where the checkpoint comes from. No time and no machine: the same conversion gives the same bytes."""
    source = plan.source
    return {
        "format": PROVENANCE_FORMAT,
        "source": {
            "name": source.name,
            "revision": source.revision,
            "model_type": source.config.model_type,
            "sha256": hashes,
        },
        "recipe": plan.recipe.to_dict(),
        "total_parameters": plan.total_parameters,
        "active_parameters": plan.active_parameters,
        "routers": None if reports is None else [report.to_dict() for report in reports],
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
    }
