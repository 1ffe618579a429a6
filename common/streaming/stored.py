"""Tensors of a checkpoint on disk, or on the Hub: where their bytes lie, from the headers of its files alone."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..settings import SettingsError


# Sizes of the element types that a safetensors header may name and a Qwen checkpoint may have.
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class SourceError(SettingsError):
    """The checkpoint that is read cannot be used as it is."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: `num_bytes` bytes at `offset` of the file `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int

    def load(self) -> torch.Tensor:
        """Return the tensor, backed by the file: only what is touched is read."""
        storage = torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=self.path.stat().st_size)
        flat = torch.empty(0, dtype=torch.uint8).set_(storage, self.offset, (self.num_bytes,))
        dtype = DTYPES[self.dtype]
        if self.offset % dtype.itemsize:
            # The format does not promise alignment, and old writers did not keep it.
            flat = flat.clone()
        return flat.view(dtype).view(self.shape)


class RemoteFiles(Protocol):
    """Files of a repository that are not on the disk."""

    def has(self, file_name: str) -> bool:
        """Return whether there is one of this name."""

    def read_header(self, path: Path) -> dict[str, StoredTensor]:
        """Return the tensors of a file by their names."""


def read_tensors(folder: Path, repository: RemoteFiles | None = None) -> dict[str, StoredTensor]:
    """Return every tensor in the safetensors files of `folder` by name, in the order of the files; reads no weight.

    Args:
        repository: where the files are that are not in `folder`.

    Raises:
        SourceError: if a file is missing, truncated or no safetensors file, or holds what is no Qwen model's.
    """
    index_path = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or (repository and repository.has("model.safetensors")):
        # Transformers too takes it first where there are shards as well.
        weight_map, file_names = {}, ["model.safetensors"]
    elif index_path.exists():
        try:
            weight_map = dict(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"])
            file_names = sorted(set(map(str, weight_map.values())))
        except (ValueError, KeyError, TypeError):
            raise SourceError(f"{index_path}: not a valid index; fetch it again.") from None
    else:
        hint = " It has pytorch_model.bin weights: load and save the model with Transformers first." * bool(
            list(folder.glob("pytorch_model*.bin"))
        )
        raise SourceError(f"{folder}: there is neither model.safetensors nor an index of its shards.{hint}")
    tensors: dict[str, StoredTensor] = {}
    for file_name in file_names:
        is_remote = repository is not None and not (folder / file_name).exists()
        header = repository.read_header(folder / file_name) if is_remote else _read_header(folder / file_name)
        if twice := header.keys() & tensors.keys():
            name = min(twice)
            raise SourceError(
                f"{folder}: tensor {name!r} is both in {tensors[name].path.name} and in {file_name}; fetch them again."
            )
        tensors |= header
    if absent := (weight_map.keys() - tensors.keys()):
        raise SourceError(f"{folder}: the index names {sorted(absent)[0]!r}, but no shard has it; fetch them again.")
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            (header_bytes,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (size_bytes,)
            header = json.loads(file.read(header_bytes)) if 8 + header_bytes <= size_bytes else None
    except FileNotFoundError:
        raise SourceError(f"{path}: the shard is missing; fetch it again.") from None
    except ValueError:
        raise SourceError(f"{path}: not a safetensors file (its header is not JSON); fetch it again.") from None
    if header is None:
        raise SourceError(f"{path}: truncated inside its header ({size_bytes} bytes); fetch it again.")
    start = 8 + header_bytes
    try:
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, start + begin, end - begin)
            for name, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SourceError(f"{path}: not a safetensors file (its header lists no tensors); fetch it again.") from None
    expected = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=start)
    if size_bytes < expected:
        raise SourceError(
            f"{path}: truncated: its header promises {expected} bytes, it has {size_bytes}; fetch it again."
        )
    return tensors


def read_config(model: str, folder: Path) -> dict[str, Any]:
    """Return what config.json in `folder` says; errors call the checkpoint `model`.

    Raises:
        SourceError: if it is missing or holds no settings.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{model}: there is no config.json; give the folder of a Transformers checkpoint.") from None
    except ValueError as error:
        raise SourceError(f"{path}: not valid JSON ({error}); fetch it again.") from None
    if not isinstance(raw, dict):
        raise SourceError(f"{path}: holds a {type(raw).__name__} instead of settings; fetch it again.")
    return raw


def check_stored(model: str, tensor: StoredTensor) -> None:
    """Check that a tensor of `model` has a known type and as many bytes as its shape needs.

    Raises:
        SourceError: if not.
    """
    if tensor.dtype not in DTYPES:
        raise SourceError(f"{model}: {tensor.name!r} has type {tensor.dtype}; allowed: {', '.join(DTYPES)}.")
    if math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize != tensor.num_bytes:
        raise SourceError(
            f"{tensor.path}: the header's bytes for {tensor.name!r} do not fit its shape; fetch it again."
        )
