"""The tasks of a study, in an order in which each comes after what it needs."""

import dataclasses
from pathlib import Path

import stages
from study_settings import Method, StudySettings
from tasks import Task

from upcycled_moe.common.settings import SettingsError


def training_task(parent: str, method: str, seed: int) -> str:
    """Return the name of the task that trains `method` from `parent` with `seed`."""
    return f"train/{parent}/{method}/seed_{seed}"


def analysis_task(parent: str, method: str, seed: int) -> str:
    """Return the name of the task that looks into what [`training_task`] trained."""
    return f"analysis/{parent}/{method}/seed_{seed}"


def study_tasks(study: StudySettings, data: Path) -> list[Task]:
    """Return all tasks of `study` on the text in the folder `data`.

    Raises:
        SettingsError: if a file of text is missing.
    """
    text = dataclasses.asdict(study.text)
    tokenizer = {"vocab_size": text.pop("vocab_size")}
    tasks = [
        Task(stages.TEXT, stages.prepare_text, text, files=_text_files(study, data)),
        Task(stages.TOKENIZER, stages.train_tokenizer, tokenizer, inputs=(stages.TEXT,)),
    ]
    tasks += [_parent_task(study, parent) for parent in study.parents]
    # A seed at a time: a study that is stopped has compared all methods with the seeds that it came to.
    for seed in study.seeds:
        for parent in study.parents:
            for name, method in study.methods_of(parent).items():
                tasks += _method_tasks(study, parent, name, method, seed)
    return tasks


def _text_files(study: StudySettings, data: Path) -> dict[str, Path]:
    files = {
        f"{domain}_{split}": data / f"{domain}_{split}.parquet"
        for domain in study.text.domains
        for split in ("train", "validation")
    }
    for path in files.values():
        if not path.is_file():
            raise SettingsError(f"{path}: there is no such file; give the folder that holds it with --data.")
    return files


def _parent_task(study: StudySettings, parent: str) -> Task:
    settings = {"model": {**study.model, **study.parents[parent]}, "training": study.parent_training}
    return Task(stages.parent_task(parent), stages.train_parent, settings, inputs=(stages.TEXT, stages.TOKENIZER))


def _method_tasks(study: StudySettings, parent: str, name: str, method: Method, seed: int) -> list[Task]:
    """Return the training of a method and, where there are routers, the analysis of what comes of it."""
    is_moe = method.recipe is not None
    settings = {
        "parent": stages.parent_task(parent),
        "recipe": study.recipe_of(method, calibration_data=[stages.PARENT_FILE]).to_dict() if is_moe else None,
        "fold_routers": method.fold_routers,
        "training": {**study.training, **method.training},
        "seed": seed,
    }
    inputs = (stages.TEXT, settings["parent"])
    trained = training_task(parent, name, seed)
    training = Task(trained, stages.train_method, settings, inputs, bulky=(stages.MODEL_FOLDER,))
    if not is_moe:
        return [training]
    analysis = {"trained": trained, "parent": settings["parent"], "analysis": study.analysis}
    return [
        training,
        Task(analysis_task(parent, name, seed), stages.analyze_method, analysis, inputs=(*inputs, trained)),
    ]
