"""What tells a checkpoint from others, whatever its folder is called."""

import hashlib
from pathlib import Path
from typing import Any

from ..common.checkpoint_names import NamedCheckpoint
from ..common.checkpoints import load_config


# All that a score depends on; not cards, logs and states of optimizers.
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
_UNRELATED = ("trainer_state.json", "upcycling.json")


def checkpoint_identity(checkpoint: NamedCheckpoint) -> dict[str, Any]:
    """Return the SHA-256 of the files of a local checkpoint, or the commit of one on the Hub.

    Raises:
        SettingsError: if a checkpoint on the Hub cannot be read.
    """
    folder = Path(checkpoint.path)
    if not folder.is_dir():
        config = load_config(checkpoint.path, own_code=False, revision=checkpoint.revision)
        return {"hub_id": checkpoint.path, "commit": config._commit_hash}
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _SUFFIXES and file.name not in _UNRELATED:
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return {"sha256": digest.hexdigest()}
