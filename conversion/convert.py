"""The conversion: a dense Qwen checkpoint goes in, a Mixture-of-Experts checkpoint comes out."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.companions import copy_companions, declare_tokenizer_class, tokenizer_class_to_declare
from ..common.output_folder import staged
from ..common.progress import Progress
from ..common.provenance import installed_versions, recorded_name, write_provenance
from ..common.streaming.writer import BUFFER_BYTES, write_weights
from ..model_cards.card import write_card
from .card import describe_result
from .output import check_output
from .plan import ConversionPlan, build_plan
from .recipe import ConversionRecipe
from .report import RouterReport
from .routers import RouterContent, router_contents
from .source import DenseSource


PROVENANCE_FORMAT = 1


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
    if plan.config.has_constant_weights:
        per_group = " per group" * (plan.config.router_selection == "prototype_top_k")
        progress.warn(
            f"num_experts_per_tok={plan.config.num_experts_per_tok}: the weight of the only expert{per_group} is "
            "always the same, so the language-modeling loss gives the routers no gradient; use 2 "
            f"experts{per_group}, or norm_topk_prob=false."
        )
    tokenizer_class = tokenizer_class_to_declare(source.name, source.folder, plan.config, progress)
    contents, reports = initial_routers(plan, progress)
    # Hashing reads what copying has just brought into memory, on another core.
    with staged(out, overwrite) as folder, _in_background(_hash_files, plan.sources) as hashes:
        with progress.task("Writing", plan.num_bytes, "bytes") as advance:
            write_weights(plan.shards, contents, folder, advance, num_parameters=plan.total_parameters)
        copy_companions(source.folder, folder)
        if tokenizer_class is not None:
            declare_tokenizer_class(folder, tokenizer_class)
        provenance = _provenance(plan, reports, hashes.result(), tokenizer_class)
        write_provenance(folder, provenance)
        # After the weights: without its configuration nothing loads. It brings the code of the model along.
        plan.config.save_pretrained(folder)
        write_card(folder)
    return ConversionResult(out, plan, reports)


def initial_routers(
    plan: ConversionPlan, progress: Progress
) -> tuple[dict[str, RouterContent], list[RouterReport] | None]:
    """Return the content of every router tensor by name, and what the routers do on the calibration text, if any."""
    if plan.recipe.calibration_data:
        # Imported here: a conversion without text need not wait for the readers of text.
        from .calibrated_routers import calibrated_routers

        return calibrated_routers(plan, progress)
    contents: dict[str, RouterContent] = {}
    for layer_idx in plan.config.moe_layers:
        contents |= router_contents(layer_idx, plan.router.tensors(layer_idx, None))
    return contents, None


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


def _hash_files(sources: tuple[DenseSource, ...], stop: threading.Event) -> list[dict[str, str]]:
    """Return the SHA-256 of each source's weight files by their names; breaks off when `stop` is set."""
    return [{path.name: _hash_file(path, stop) for path in source.weight_files} for source in sources]


def _hash_file(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not stop.is_set() and (data := file.read(BUFFER_BYTES)):
            digest.update(data)
    return digest.hexdigest()


def _provenance(
    plan: ConversionPlan,
    reports: list[RouterReport] | None,
    hashes: list[dict[str, str]],
    tokenizer_class: str | None,
) -> dict[str, Any]:
    """Return where the checkpoint comes from. No time and no machine: the same conversion gives the same bytes."""
    source, *others = (
        {
            "name": recorded_name(source.name, source.folder),
            "revision": source.revision,
            "model_type": source.config.model_type,
            "sha256": source_hashes,
        }
        for source, source_hashes in zip(plan.sources, hashes, strict=True)
    )
    return {
        "format": PROVENANCE_FORMAT,
        "source": source,
        "expert_sources": others,
        "tokenizer_class": tokenizer_class,
        "recipe": plan.recipe.to_dict(),
        "total_parameters": plan.total_parameters,
        "active_parameters": plan.active_parameters,
        "routers": None if reports is None else [report.to_dict() for report in reports],
        "description": describe_result(plan),
        "versions": installed_versions(),
    }
