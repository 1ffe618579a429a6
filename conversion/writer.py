"""Writing a checkpoint folder: streamed, and all or nothing."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..common.settings import SettingsError
from .experts import FileBytes
from .numbers import format_bytes
from .plan import ConversionPlan, PlannedTensor, Shard
from .source import DTYPES


BUFFER_BYTES = 8 * 1024**2
# What the files beside the weights may need: configuration, code, tokenizer, card.
COMPANION_BYTES = 64 * 1000**2

Content = FileBytes | Tensor
Progress = Callable[[int], None]


class OutputError(SettingsError):
    """The output folder cannot be written as asked."""


def check_output(plan: ConversionPlan, out: Path, overwrite: bool) -> None:
    """Check, before anything is written, that `out` is free to use and its disk large enough.

    Raises:
        OutputError: if not.
    """
    if out.is_file():
        raise OutputError(f"{out}: is a file; give a folder that does not exist yet.")
    if out.is_dir() and out.resolve() == plan.source.folder.resolve():
        raise OutputError(f"{out}: is the dense model itself; give another folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(f"{out}: exists and is not empty; give another folder, or --overwrite to replace it.")
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{out}: no permission to write in {folder}.")
    reclaimed = _folder_bytes(staging_folder(out))
    needed, free = plan.num_bytes + COMPANION_BYTES, shutil.disk_usage(folder).free + reclaimed
    if free < needed:
        raise OutputError(
            f"{out}: needs {format_bytes(needed)}, {format_bytes(free)} are free on its disk; make room or write "
            "elsewhere."
        )


def staging_folder(out: Path) -> Path:
    """Return the folder in which `out` comes to be; nothing loads from it."""
    return out.with_name(out.name + ".partial")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give a fresh folder to write into, and put it in the place of `out` only if all went well.

    On an error the folder is removed. A killed run leaves `OUT.partial`, without a configuration to load it by; the
    next run starts it anew. What was in `out` is there until the last moment.
    """
    partial = staging_folder(out)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync_folder(partial)
        _put_in_place(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_weights(
    plan: ConversionPlan, contents: Mapping[str, Content], folder: Path, progress: Progress = lambda num_bytes: None
) -> None:
    """Write the shards of `plan` and, last, their index.

    Args:
        contents: content of the planned tensors that have none yet, by name.
        progress: called with the bytes just written.
    """
    for shard in plan.shards:
        _write_shard(shard, contents, folder / shard.file_name, progress)
    if len(plan.shards) > 1:
        index = {
            "metadata": {"total_size": plan.num_bytes, "total_parameters": plan.total_parameters},
            "weight_map": {tensor.name: shard.file_name for shard in plan.shards for tensor in shard.tensors},
        }
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` and have it on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_shard(shard: Shard, contents: Mapping[str, Content], path: Path, progress: Progress) -> None:
    # Sorted by element size, so that every tensor is aligned; within a size in the plan's order.
    tensors = sorted(shard.tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    with path.open("wb") as file:
        file.write(_header(tensors))
        file.flush()
        for tensor in tensors:
            content = contents[tensor.name] if tensor.content is None else tensor.content
            written = _write_content(file.fileno(), tensor, content, progress)
            assert written == tensor.num_bytes, f"{tensor.name}: wrote {written} of {tensor.num_bytes} bytes"
        os.fsync(file.fileno())


def _header(tensors: list[PlannedTensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_content(out_fd: int, tensor: PlannedTensor, content: Content, progress: Progress) -> int:
    if isinstance(content, Tensor):
        assert tuple(content.shape) == tensor.shape, f"{tensor.name}: {tuple(content.shape)}, planned {tensor.shape}"
        flat = content.to(DTYPES[tensor.dtype]).contiguous().view(-1).view(torch.uint8)
        _write_all(out_fd, memoryview(flat.numpy()))
        progress(flat.numel())
        return flat.numel()
    written = 0
    for _ in range(content.repeats):
        for source, begin, num_bytes in content.spans:
            with source.path.open("rb") as file:
                _copy_bytes(file.fileno(), out_fd, source.offset + begin, num_bytes, progress)
            written += num_bytes
    return written


def _copy_bytes(in_fd: int, out_fd: int, offset: int, num_bytes: int, progress: Progress) -> None:
    """Append `num_bytes` bytes from `offset` of one file to another, in the kernel where it can."""
    end = offset + num_bytes
    while offset < end:
        count = min(BUFFER_BYTES, end - offset)
        try:
            copied = os.sendfile(out_fd, in_fd, offset, count)
        except (AttributeError, OSError) as error:
            # No sendfile on this system, or not between files; anything else (a full disk) is for the caller.
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK):
                raise
            data = os.pread(in_fd, count, offset)
            _write_all(out_fd, memoryview(data))
            copied = len(data)
        if copied == 0:
            raise OSError(errno.EIO, "the source file became shorter while it was read")
        offset += copied
        progress(copied)


def _write_all(out_fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(out_fd, data) :]


def _put_in_place(partial: Path, out: Path) -> None:
    if not out.exists():
        os.replace(partial, out)
        return
    replaced = out.with_name(out.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    os.replace(out, replaced)
    try:
        os.replace(partial, out)
    except OSError:
        os.replace(replaced, out)
        raise
    shutil.rmtree(replaced)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
