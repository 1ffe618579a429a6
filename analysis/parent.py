"""The feed-forward networks of the dense model that experts were copied from, read layer by layer.

Dimensions: H hidden size, I intermediate size.
"""

import json
from collections.abc import Mapping
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

# A checkpoint of a whole model names its tensors with it, one of the base model without.
_PREFIXES = ("model.", "")


class DenseParent:
    """Opens a dense checkpoint in safetensors without loading the model.

    Args:
        model: folder or Hub id, which is downloaded if it is not in the cache.

    Raises:
        SettingsError: if there is no such checkpoint, or one of its files cannot be read.
    """

    def __init__(self, model: str):
        self.name = model
        check_exists(model)
        folder = Path(model) if Path(model).is_dir() else _download(model)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(model, folder):
            shapes = _shapes(file)
            self._shapes |= shapes
            self._files |= dict.fromkeys(shapes, file)

    def fits(self, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether decoder layer `layer` has a feed-forward network whose matrices have these `shapes`."""
        names = self._names(layer)
        return all(self._shapes.get(names[matrix]) == tuple(shapes[matrix]) for matrix in MATRICES)

    def feed_forward(self, layer: int) -> dict[str, torch.Tensor]:
        """Return `gate` [I, H], `up` [I, H] and `down` [H, I] of decoder layer `layer`; empty if it has them not.

        Raises:
            SettingsError: if a file cannot be read.
        """
        names = self._names(layer)
        if not all(name in self._files for name in names.values()):
            return {}
        tensors = {}
        for matrix, name in names.items():
            try:
                with safe_open(self._files[name], framework="pt") as file:
                    tensors[matrix] = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise _unreadable(self._files[name], error) from error
        return tensors

    def _names(self, layer: int) -> dict[str, str]:
        """Return the names of the tensors of a layer by matrix, whether the checkpoint has them or not."""
        choices = [
            {matrix: f"{prefix}layers.{layer}.mlp.{matrix}_proj.weight" for matrix in MATRICES} for prefix in _PREFIXES
        ]
        return next((names for names in choices if names["gate"] in self._files), choices[0])


def _weight_files(model: str, folder: Path) -> list[Path]:
    try:
        if (folder / _INDEX).exists():
            weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return [folder / file for file in dict.fromkeys(weight_map.values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{model}: not a checkpoint in safetensors ({_reason(error)})") from error
    if not (folder / _SINGLE).is_file():
        raise SettingsError(f"{model}: not a checkpoint in safetensors (no {_SINGLE}, no {_INDEX})")
    return [folder / _SINGLE]


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a file, from its header; a file that was cut off is seen by its size."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> SettingsError:
    return SettingsError(f"{path}: cannot be read ({_reason(error)})")


def _download(model: str) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", _INDEX]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(f"{model}: cannot be fetched from the Hub ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
