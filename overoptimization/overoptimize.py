"""The folder that a measurement writes: the table of samples and scores, then the results and their picture."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.checkpoint_names import NamedCheckpoint
from ..common.checkpoints import check_code, load_config
from ..common.files import replacing, write_text
from ..common.output_folder import FolderKind, check_output_folder
from ..common.pictures import INSTALL, can_draw
from ..common.progress import Progress
from ..common.provenance import installed_versions
from ..common.settings import SettingsError
from ..preference.scoring import check_gives_one_score
from .generation import generate_samples, read_prompts, sample_facts
from .identity import checkpoint_identity
from .plot import write_plot
from .results import Results, measure_models
from .samples import Messages, SampleTable, read_samples, table_facts
from .score_table import TABLE_FILE, ScoreTable
from .scoring import Scorer, gold_column
from .settings import OveroptimizationSettings, PolicySettings


RESULTS_FILE = "results.json"
PICTURE_FILE = "curves.png"
FORMAT = 1

_FILES = (TABLE_FILE, PICTURE_FILE, RESULTS_FILE)
# A killed run may leave a file half written, under another name.
MEASUREMENT = FolderKind(
    "measurement", (TABLE_FILE,), contents=frozenset((*_FILES, *(f"{name}.partial" for name in _FILES)))
)


@dataclass(frozen=True)
class Measurement:
    """What was measured, and of what.

    Args:
        facts: about samples, gold, models, settings and versions; they fit in JSON.
    """

    results: Results
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything; it fits in JSON."""
        content = self.results.to_dict()
        models = {name: {**self.facts["models"][name], **model} for name, model in content["models"].items()}
        return {"format": FORMAT, **self.facts, **content, "models": models}


def measure_overoptimization(
    settings: OveroptimizationSettings, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Measurement:
    """Draw samples if asked to, score them by all models, and write what follows to the folder `out`.

    The table grows there score by score. A run that is stopped goes on where it was, and one with other models takes
    the scores that are there. `results.json` comes last: a folder that has it is finished.

    Args:
        overwrite: whether `out` may be a finished one.

    Raises:
        SettingsError: if `out` cannot be written, or samples, gold or a model do not fit.
    """
    progress = progress or Progress()
    is_finished = (out / RESULTS_FILE).exists()
    check_output_folder(out, 0, _read(settings), overwrite or not is_finished, MEASUREMENT)
    _check_checkpoints(settings)
    identities = {one: checkpoint_identity(one) for one in _reward_checkpoints(settings)}
    _check_different(settings, identities)
    table = _open_table(settings, out, overwrite, progress)
    scorer = Scorer(table, settings, identities, progress)
    gold = scorer.gold(settings.gold, settings.gold_column)
    results = measure_models(
        scorer.models(settings.reward_models, settings.ensembles),
        gold,
        baseline=settings.baseline_name,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
    )
    measurement = Measurement(results, _facts(settings, table.samples, scorer, gold))
    _write(measurement, out, progress)
    return measurement


def _open_table(settings: OveroptimizationSettings, out: Path, overwrite: bool, progress: Progress) -> ScoreTable:
    """Return the table in `out`, which is there already or comes to be."""
    path = out / TABLE_FILE
    kept, source = table_facts(path), path
    if not isinstance(settings.samples, PolicySettings):
        samples, source = read_samples(settings.samples), settings.samples
        is_kept = kept is not None and kept["sha256"] == samples.sha256
        _check_replaceable(out, kept is None or is_kept or overwrite)
    else:
        prompts = read_prompts(settings.samples)
        facts = sample_facts(settings.samples, prompts, batch_size=settings.batch_size, dtype=settings.dtype)
        is_kept = kept is not None and facts.items() <= kept["origin"].items()
        _check_replaceable(out, kept is None or is_kept or overwrite)
        if is_kept:
            progress.tell(f"{path}: its samples are taken.")
        samples = read_samples(path) if is_kept else _draw(settings, settings.samples, prompts, progress)
    _check_samples(samples, settings.gold_column, progress)
    out.mkdir(parents=True, exist_ok=True)
    if not is_kept:
        # They would stand beside samples that are not theirs.
        (out / RESULTS_FILE).unlink(missing_ok=True)
        (out / PICTURE_FILE).unlink(missing_ok=True)
    return ScoreTable(samples, path, earlier=[source, path])


def _check_replaceable(out: Path, is_replaceable: bool) -> None:
    if not is_replaceable:
        raise SettingsError(
            f"{out}: holds scores of other samples; give another folder, or --overwrite to replace them. "
            f"--samples {out / TABLE_FILE} takes those."
        )


def _check_samples(samples: SampleTable, column: str | None, progress: Progress) -> None:
    """Check before the first hour of work that there is something to choose, and gold to choose it by."""
    if column is not None:
        gold_column(samples, column)
    num_prompts, _ = samples.shape
    if samples.num_alike == num_prompts:
        raise SettingsError(
            "The responses to each prompt are all the same, so that there is nothing to choose; give others, or raise "
            "--temperature."
        )
    if samples.num_alike:
        progress.warn(
            f"the responses to {samples.num_alike:,} of {num_prompts:,} prompts are all the same; they flatten every "
            "curve."
        )


def _draw(
    settings: OveroptimizationSettings, policy: PolicySettings, prompts: list[Messages], progress: Progress
) -> SampleTable:
    return generate_samples(
        policy,
        prompts,
        batch_size=settings.batch_size,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        progress=progress,
    )


def _write(measurement: Measurement, out: Path, progress: Progress) -> None:
    if can_draw():
        write_plot(measurement.results, out / PICTURE_FILE)
    else:
        progress.warn(f"there is no picture: Matplotlib is not installed ({INSTALL}).")
    with replacing(out / RESULTS_FILE) as partial:
        write_text(partial, json.dumps(measurement.to_dict(), indent=2, allow_nan=False) + "\n")


def _facts(
    settings: OveroptimizationSettings, samples: SampleTable, scorer: Scorer, gold: np.ndarray
) -> dict[str, Any]:
    num_prompts, num_responses = samples.shape
    models: dict[str, Any] = {
        model.name: {"checkpoints": [scorer.source(one) for one in model.checkpoints]}
        for model in settings.reward_models
    }
    models |= {one.name: {"method": one.method, "members": list(one.members)} for one in settings.ensembles}
    source = {"column": settings.gold_column} if settings.gold is None else scorer.source(settings.gold)
    return {
        "samples": {
            "num_prompts": num_prompts,
            "num_responses": num_responses,
            "sha256": samples.sha256,
            "origin": samples.origin,
        },
        "gold": {
            **source,
            "mean": float(gold.mean()),
            "standard_deviation": float(gold.std()),
            "standard_deviation_within_prompts": float((gold - gold.mean(axis=1, keepdims=True)).std()),
        },
        "models": models,
        "settings": {
            name: getattr(settings, name) for name in ("max_length", "dtype", "batch_size", "num_resamples", "seed")
        },
        "versions": installed_versions() | {"numpy": np.__version__},
    }


def _check_checkpoints(settings: OveroptimizationSettings) -> None:
    """Check before the first hour of work that the last model can be used."""
    for checkpoint in _checkpoints(settings):
        check_code(checkpoint.path, trust_remote_code=settings.trust_remote_code, revision=checkpoint.revision)
    for checkpoint in _reward_checkpoints(settings):
        check_gives_one_score(load_config(checkpoint.path, revision=checkpoint.revision), checkpoint.path)


def _check_different(settings: OveroptimizationSettings, identities: Mapping[NamedCheckpoint, dict[str, Any]]) -> None:
    """Check that no reward model is gold, and no seed another, wherever their folders are."""
    for model in settings.reward_models:
        for number, checkpoint in enumerate(model.checkpoints):
            identity = identities[checkpoint]
            if settings.gold is not None and identity == identities[settings.gold]:
                raise SettingsError(
                    f"{model.name}: {checkpoint.path} is gold itself ({settings.gold.path}); give a reward model that "
                    "is not."
                )
            for other in model.checkpoints[:number]:
                if identity == identities[other]:
                    raise SettingsError(
                        f"{model.name}: {checkpoint.path} is the same checkpoint as {other.path}; give each seed once."
                    )


def _checkpoints(settings: OveroptimizationSettings) -> Iterator[NamedCheckpoint]:
    if isinstance(settings.samples, PolicySettings):
        yield settings.samples.policy
    yield from _reward_checkpoints(settings)


def _reward_checkpoints(settings: OveroptimizationSettings) -> Iterator[NamedCheckpoint]:
    if settings.gold is not None:
        yield settings.gold
    for model in settings.reward_models:
        yield from model.checkpoints


def _read(settings: OveroptimizationSettings) -> Iterator[Path]:
    """Yield the files and folders that a measurement reads, but its own table."""
    for checkpoint in _checkpoints(settings):
        yield Path(checkpoint.path)
    yield from map(Path, settings.samples.prompts if isinstance(settings.samples, PolicySettings) else [])
