"""The feed-forward networks of the dense model that experts were copied from, read layer by layer.

Dimensions: H hidden size, I intermediate size.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..common.checkpoints import check_exists
from ..common.settings import SettingsError


MATRICES = ("gate", "up", "down")

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class DenseParent:
    """Opens a dense checkpoint in safetensors without loading the model.

    Args:
        model: folder or Hub id, which is downloaded if it is not in the cache.

    Raises:
        SettingsError: if there is no such checkpoint.
    """

    def __init__(self, model: str):
        self.name = model
        check_exists(model)
        folder = Path(model) if Path(model).is_dir() else _download(model)
        self._files = _files_by_tensor(model, folder)

    def feed_forward(self, layer: int) -> dict[str, torch.Tensor]:
        """Return `gate` [I, H], `up` [I, H] and `down` [H, I] of decoder layer `layer`; empty if it has them not.

        Raises:
            SettingsError: if a file cannot be read.
        """
        names = {matrix: f"model.layers.{layer}.mlp.{matrix}_proj.weight" for matrix in MATRICES}
        if not all(name in self._files for name in names.values()):
            return {}
        tensors = {}
        for matrix, name in names.items():
            try:
                with safe_open(self._files[name], framework="pt") as file:
                    tensors[matrix] = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise SettingsError(f"{self._files[name]}: cannot be read ({_reason(error)})") from error
        return tensors


def _files_by_tensor(model: str, folder: Path) -> dict[str, Path]:
    try:
        if (folder / _INDEX).exists():
            weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in weight_map.items()}
        with safe_open(folder / _SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / _SINGLE)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{model}: not a checkpoint in safetensors ({_reason(error)})") from error


def _download(model: str) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", _INDEX]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(f"{model}: cannot be fetched from the Hub ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
