"""What a folder of rounds says of the run that it is of, so that no other goes on with it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...common.files import replacing, write_text
from ...common.settings import SettingsError
from .dpo_arguments import IterativeDPOArguments, resolved_settings
from .round_pairs import PairSets


STATE_FILE = "iterative_dpo.json"
CONFIG_FILE = "training_config.yaml"
FORMAT = 1
# Settings that may be others when a run goes on: they change no weight and no figure.
WITHOUT_EFFECT = (
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_timeout",
    "log_level",
    "log_level_replica",
    "logging_steps",
    "output_dir",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "torch_empty_cache_steps",
)
# Bytes of a file of weights that are read to tell it from another; of a whole checkpoint that would take minutes.
NUM_BYTES = 1 << 16


def input_digests(
    arguments: IterativeDPOArguments, pairs: PairSets, tokenizer: PreTrainedTokenizerBase, start: Path
) -> dict[str, str | None]:
    """Return digests of what `arguments` name, by the settings that do: it may change with none of them.

    Args:
        start: folder of π_0.
    """
    is_same = arguments.rounds.round_data == "same"
    return {
        "train_data": _digest(_lines(*(pairs.rounds[:1] if is_same else pairs.rounds))),
        "merge_data": None if pairs.merge is None else _digest(_lines(pairs.merge)),
        "eval_data": _digest(_lines(pairs.evaluation)),
        "chat_template": _digest([str(tokenizer.chat_template).encode()]),
        "tokenizer_name": _digest([json.dumps(sorted(tokenizer.get_vocab().items())).encode()]),
        "model_name_or_path": _digest(_identity(start)),
    }


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _lines(*datasets: Dataset) -> Iterable[bytes]:
    """Yield the rows of `datasets`, and where each of them ends."""
    for dataset in datasets:
        yield from (json.dumps(row, sort_keys=True).encode() for row in dataset)
        yield b"\n"


def _identity(folder: Path) -> Iterable[bytes]:
    """Yield what tells the checkpoint in `folder` from another: configuration, names, sizes, headers, last weights."""
    yield (folder / "config.json").read_bytes()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        yield f"{file.name} {size}\n".encode()
        with file.open("rb") as stream:
            yield stream.read(NUM_BYTES)
            stream.seek(max(size - NUM_BYTES, 0))
            yield stream.read(NUM_BYTES)


def begin_run(
    folder: Path, arguments: IterativeDPOArguments, num_processes: int, inputs: Mapping[str, str | None]
) -> None:
    """Make `folder` that of a run with `arguments`, or check that it is; one that has done nothing yet may be another.

    Args:
        inputs: of [`input_digests`].

    Raises:
        SettingsError: if it is that of a run with other settings or input, or holds something else.
    """
    settings = resolved_settings(arguments)
    deciding = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    if arguments.rounds.round_data == "same":
        # Further rounds do not change those before.
        del deciding["num_rounds"]
    state = {"format": FORMAT, "settings": {**deciding, "processes": num_processes}, "inputs": dict(inputs)}
    if (folder / STATE_FILE).is_file() and _has_begun(folder):
        _check_same(folder, json.loads(json.dumps(state)))
        return
    if folder.exists() and (not folder.is_dir() or not _is_free(folder)):
        raise SettingsError(
            f"output_dir={folder}: is not empty and holds no run of iterative DPO; give another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG_FILE) as partial:
        write_text(partial, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    # Last: it says that the folder is a run's.
    with replacing(folder / STATE_FILE) as partial:
        write_text(partial, json.dumps(state, indent=1) + "\n")


def _has_begun(folder: Path) -> bool:
    """Return whether a run has written anything of a round in `folder`."""
    return any(path.suffix != ".partial" for path in folder.glob("round-*/*"))


def _is_free(folder: Path) -> bool:
    """Return whether `folder` holds no more than a run leaves that was killed at its beginning."""
    if (folder / STATE_FILE).is_file():
        return True
    own = {f"{name}{ending}" for name in (STATE_FILE, CONFIG_FILE) for ending in ("", ".partial")}
    return all(path.name in own for path in folder.iterdir())


def _check_same(folder: Path, state: dict[str, Any]) -> None:
    try:
        before = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        settings, inputs, version = before["settings"], before["inputs"], before["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{folder / STATE_FILE}: is damaged ({error}); give another output_dir.") from error
    if version != FORMAT:
        raise SettingsError(
            f"{folder / STATE_FILE}: has format {version}, this version goes on with {FORMAT} only; give another "
            "output_dir."
        )
    for name in sorted({*settings, *state["settings"]}):
        old, new = settings.get(name), state["settings"].get(name)
        if old != new:
            raise SettingsError(
                f"output_dir={folder}: holds a run with {name}={old!r}, not {new!r}; go on with its settings, or give "
                "another folder."
            )
    for name, digest in state["inputs"].items():
        if inputs.get(name) != digest:
            raise SettingsError(
                f"output_dir={folder}: holds a run with the same settings, but what {name} stands for has changed "
                "since; put it back as it was, or give another folder."
            )
