"""What tells a checkpoint from others, whatever its folder is called."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..common.checkpoint_names import NamedCheckpoint
from ..common.checkpoints import load_config
from ..common.settings import SettingsError


# Cards, logs and what training goes on from. A score may depend on any other file, in whatever form weights are.
_UNRELATED = (
    *("*.md", "*.yaml", "*.yml", "*.jsonl", "*.log", "*.png", "*.lock", ".*", "trainer_state.json", "upcycling.json"),
    *("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*"),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
_ADAPTER = "adapter_config.json"


def checkpoint_identity(checkpoint: NamedCheckpoint) -> dict[str, Any]:
    """Return the SHA-256 of the files of a local checkpoint, or the commit of one on the Hub.

    That of an adapter depends on the model that it changes, too.

    Raises:
        SettingsError: if a folder holds no weights, or a checkpoint on the Hub cannot be read.
    """
    folder = Path(checkpoint.path)
    if not folder.is_dir():
        config = load_config(checkpoint.path, own_code=False, revision=checkpoint.revision)
        return {"hub_id": checkpoint.path, "commit": config._commit_hash}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not any(map(file.match, _UNRELATED))]
    if not any(file.suffix in _WEIGHTS for file in files):
        raise SettingsError(f"{folder}: holds no weights ({', '.join(_WEIGHTS)}); give a whole checkpoint.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    if (folder / _ADAPTER).exists():
        digest.update(json.dumps(checkpoint_identity(_base(folder / _ADAPTER))).encode())
    return {"sha256": digest.hexdigest()}


def _base(adapter: Path) -> NamedCheckpoint:
    """Return the model that an adapter changes."""
    try:
        content = json.loads(adapter.read_text(encoding="utf-8"))
        return NamedCheckpoint("base", content["base_model_name_or_path"], content.get("revision"))
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{adapter}: does not name the model that it changes; save the adapter again.") from error
