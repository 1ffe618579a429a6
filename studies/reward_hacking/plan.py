"""The tasks of a study, in an order in which each comes after what it needs."""

import dataclasses
from pathlib import Path
from typing import Any

from upcycled_moe.common.settings import SettingsError

from ..router_upcycling.tasks import Task
from . import model_stages, text_stages
from .files import (
    GOLD,
    GOLD_PAIRS,
    MERGE_PAIRS,
    MODEL_FOLDER,
    POLICY,
    SAMPLES,
    SCORED_PAIRS,
    TEXT,
    curves_task,
    labels_task,
    merge_labels_task,
    proxy_task,
)
from .settings import StudySettings, World


DENSE, MOE = "dense", "moe"
# The dense model, half-way: what both go on from.
HALF = "half"
MERGES = (model_stages.SHARED, model_stages.AVERAGE, model_stages.LEARNED)
# Each with the seeds of the dense model as members.
ENSEMBLES = {"ensemble_mean": "mean", "ensemble_min": "min"}
METHODS = (DENSE, MOE, *MERGES, *ENSEMBLES)


def study_tasks(study: StudySettings, data: Path) -> list[Task]:
    """Return all tasks of `study` on the preference pairs in the folder `data`.

    Raises:
        SettingsError: if a file of them is missing.
    """
    text = dataclasses.asdict(study.text)
    policy = {"vocab_size": text.pop("vocab_size"), "model": study.model, "training": study.policy_training}
    samples = dataclasses.asdict(study.samples)
    num_merge_prompts = samples.pop("merge_prompts")
    first = study.samples.gold_prompts + study.samples.training_prompts
    merge_pairs = {
        "prompts": [first, first + num_merge_prompts],
        "num_samples": study.samples.responses_per_training_prompt,
        **{name: samples[name] for name in ("temperature", "max_new_tokens")},
        **_scoring(study),
    }
    gold_pairs = {"responses_per_gold_prompt": study.samples.responses_per_gold_prompt}
    tasks = [
        Task(TEXT, text_stages.prepare_text, text, files=_pair_files(study, data)),
        Task(POLICY, model_stages.train_policy, policy, inputs=(TEXT,)),
        Task(SAMPLES, text_stages.draw_samples, samples, inputs=(TEXT, POLICY)),
        Task(GOLD_PAIRS, text_stages.pair_for_gold, gold_pairs, inputs=(TEXT, SAMPLES)),
        Task(GOLD, model_stages.train_gold, {"training": study.gold_training}, inputs=(POLICY, GOLD_PAIRS)),
        Task(SCORED_PAIRS, text_stages.score_pairs, _scoring(study), inputs=(SAMPLES, GOLD)),
        Task(MERGE_PAIRS, text_stages.draw_merge_pairs, merge_pairs, inputs=(TEXT, POLICY, GOLD)),
    ]
    for name, world in study.worlds.items():
        tasks += _world_tasks(study, name, world)
    return tasks


def _pair_files(study: StudySettings, data: Path) -> dict[str, Path]:
    files = {
        f"{source}_{split}": data / f"{source}_{split}.parquet"
        for source in study.text.sources
        for split in ("train", "test")
    }
    for path in files.values():
        if not path.is_file():
            raise SettingsError(f"{path}: there is no such file; give the folder that holds it with --data.")
    return files


def _scoring(study: StudySettings) -> dict[str, Any]:
    return {name: study.scoring[name] for name in ("batch_size", "max_length")}


def _world_tasks(study: StudySettings, name: str, world: World) -> list[Task]:
    noise = {key: value for key, value in dataclasses.asdict(world).items() if key != "title"}
    tasks = [
        Task(labels_task(name), text_stages.label_pairs, noise, inputs=(SCORED_PAIRS,)),
        Task(merge_labels_task(name), text_stages.label_pairs, noise, inputs=(MERGE_PAIRS,)),
    ]
    for seed in study.seeds:
        tasks += _seed_tasks(study, name, seed)
    trained = {method: [proxy_task(name, method, seed) for seed in study.seeds] for method in (DENSE, MOE, *MERGES)}
    settings = {"models": trained, "baseline": DENSE, "ensembles": ENSEMBLES, "scoring": study.scoring}
    inputs = (SAMPLES, GOLD, *(task for tasks_of_one in trained.values() for task in tasks_of_one))
    return [*tasks, Task(curves_task(name), model_stages.measure_world, settings, inputs)]


def _seed_tasks(study: StudySettings, world: str, seed: int) -> list[Task]:
    labels, half, moe = labels_task(world), proxy_task(world, HALF, seed), proxy_task(world, MOE, seed)

    def train(method: str, start: str, training: dict[str, Any], recipe: dict[str, Any] | None) -> Task:
        settings = {"start": start, "labels": labels, "training": training, "recipe": recipe, "seed": seed}
        inputs = (start, labels)
        return Task(proxy_task(world, method, seed), model_stages.train_proxy, settings, inputs, bulky=(MODEL_FOLDER,))

    def merge(method: str) -> Task:
        settings: dict[str, Any] = {"moe": moe, "method": method}
        inputs: tuple[str, ...] = (moe,)
        if method == model_stages.LEARNED:
            # Not those that the experts were trained on: these say nothing of which expert is right on others.
            pairs = merge_labels_task(world)
            settings |= {"labels": pairs, "learned_merge": study.learned_merge, "seed": seed}
            inputs = (moe, pairs)
        return Task(proxy_task(world, method, seed), model_stages.merge_experts, settings, inputs)

    continued = {**study.training, **study.continued}
    return [
        train(HALF, POLICY, study.training, None),
        train(DENSE, half, continued, None),
        train(MOE, half, continued, study.recipe),
        *map(merge, MERGES),
    ]
