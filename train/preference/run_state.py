"""What a folder of rounds says of the run that it is of, so that no other goes on with it."""

import json
from pathlib import Path
from typing import Any

import yaml

from ...common.files import replacing, write_text
from ...common.settings import SettingsError
from .dpo_arguments import IterativeDPOArguments, resolved_settings


STATE_FILE = "iterative_dpo.json"
CONFIG_FILE = "training_config.yaml"
FORMAT = 1
# Settings that may be others when a run goes on: they change no weight and no figure.
WITHOUT_EFFECT = ("output_dir", "logging_steps", "report_to", "save_steps", "save_total_limit", "disable_tqdm")


def begin_run(folder: Path, arguments: IterativeDPOArguments, num_processes: int) -> None:
    """Make `folder` that of a run with `arguments`, or check that it is.

    Raises:
        SettingsError: if it is that of a run with other settings, or holds something else.
    """
    settings = resolved_settings(arguments)
    deciding = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    if arguments.rounds.round_data == "same":
        # Further rounds do not change those before.
        del deciding["num_rounds"]
    state = {"format": FORMAT, "settings": {**deciding, "processes": num_processes}}
    if (folder / STATE_FILE).is_file():
        _check_same(folder, json.loads(json.dumps(state)))
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(
            f"output_dir={folder}: is not empty and holds no run of iterative DPO; give another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    # First, as what is in a folder without a state is no run's.
    with replacing(folder / STATE_FILE) as partial:
        write_text(partial, json.dumps(state, indent=1) + "\n")
    with replacing(folder / CONFIG_FILE) as partial:
        write_text(partial, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _check_same(folder: Path, state: dict[str, Any]) -> None:
    try:
        before = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        settings, version = before["settings"], before["format"]
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
