"""Files that are there whole or not at all: written apart, brought to the disk, and then moved.

What is under way lies in a folder `_unfinished` of the run, which no name of a checkpoint matches and which uploads to
the Hub pass over. A run that is killed leaves it behind, and the next one clears it.
"""

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError


STAGING_FOLDER = "_unfinished"
MODEL_FOLDER = "model"
# Lists the files of a whole model that is being moved.
MOVING_FILE = "moving.json"
# Without one of these nothing takes a folder for a model.
ENTRY_FILES = ("config.json", "adapter_config.json")
WEIGHT_PATTERNS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model*")


def discard(folder: Path) -> None:
    """Remove `folder`, if it is there; what is left of it if that is cut short has no name that is resumed from."""
    if not folder.exists():
        return
    doomed = folder
    if folder.parent.name != STAGING_FOLDER:
        doomed = folder.parent / STAGING_FOLDER / f"removed-{folder.name}"
        doomed.parent.mkdir(exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    _remove_if_empty(doomed.parent)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def bring_to_disk(folder: Path) -> None:
    """Return once all of `folder` would outlast a power failure."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems know no such thing for folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def publish_folder(staged: Path, folder: Path) -> None:
    """Move the folder `staged` to `folder`, in the place of one that may be there."""
    bring_to_disk(staged)
    # A folder with files cannot be replaced at once. One of the same step is there only where the run went on from
    # an earlier one, which stands.
    discard(folder)
    os.replace(staged, folder)
    _sync(folder.parent)
    _remove_if_empty(staged.parent)


def publish_model(output_dir: Path) -> None:
    """Move a model from its staging folder into `output_dir`, where nothing can be loaded until all of it is there.

    If that is cut short, `finish_moving_model` moves the rest.
    """
    staged = output_dir / STAGING_FOLDER / MODEL_FOLDER
    bring_to_disk(staged)
    partial = staged / f"{MOVING_FILE}.partial"
    partial.write_text(json.dumps([path.name for path in staged.iterdir()]), encoding="utf-8")
    _sync(partial)
    os.replace(partial, staged / MOVING_FILE)
    _sync(staged)
    _move_model(staged, output_dir)


def _move_model(staged: Path, output_dir: Path) -> None:
    names = json.loads((staged / MOVING_FILE).read_text(encoding="utf-8"))
    remaining = {name for name in names if (staged / name).exists()}
    for name in remaining.intersection(ENTRY_FILES):
        (output_dir / name).unlink(missing_ok=True)
    for pattern in WEIGHT_PATTERNS:
        for stale in output_dir.glob(pattern):
            if stale.name not in names:
                stale.unlink()
    # The entry files come last.
    for name in sorted(remaining, key=ENTRY_FILES.__contains__):
        target = output_dir / name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(staged / name, target)
    _sync(output_dir)
    discard(staged)


def finish_moving_model(output_dir: Path) -> None:
    """Move the rest of a model that a killed run was moving into `output_dir`."""
    staged = output_dir / STAGING_FOLDER / MODEL_FOLDER
    if (staged / MOVING_FILE).is_file():
        _move_model(staged, output_dir)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what a killed run left half-written."""
    shutil.rmtree(output_dir / STAGING_FOLDER, ignore_errors=True)


def keep_newest(folders: Iterable[Path], limit: int, protected: Collection[Path]) -> None:
    """Remove the `folders` that were written first, but none that is `protected`, until `limit` are left."""
    folders = sorted(folders, key=lambda folder: folder.stat().st_mtime)
    candidates = [folder for folder in folders if folder not in protected]
    for folder in candidates[: max(len(folders) - limit, 0)]:
        discard(folder)


def is_failed_write(error: BaseException) -> bool:
    """Return whether `error` is what Python, safetensors or `torch.save` raise where a file cannot be written."""
    if isinstance(error, RuntimeError):
        # The archive writer of torch says neither which file nor why.
        return "inline_container" in str(error) or "PytorchStreamWriter" in str(error) or "iostream" in str(error)
    return isinstance(error, OSError | SafetensorError)
