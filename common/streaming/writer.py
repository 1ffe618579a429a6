"""Writing the weights of a checkpoint, streamed."""

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_text
from .contents import Content, FileBytes
from .planned import PlannedTensor, Shard
from .stored import DTYPES


BUFFER_BYTES = 1024**2
PAGE_BYTES = 4096

# What can be written: what a plan holds, or a tensor, or what makes the tensor when it is written.
Writable = Content | Tensor | Callable[[], Tensor]
Progress = Callable[[int], None]


def write_weights(
    shards: Sequence[Shard],
    contents: Mapping[str, Writable],
    folder: Path,
    progress: Progress = lambda num_bytes: None,
    *,
    num_parameters: int | None = None,
) -> None:
    """Write `shards` and, last, their index.

    Args:
        contents: content of the planned tensors that have none yet, by name.
        progress: called with the bytes just written.
        num_parameters: for the index; left out there by default.
    """
    for shard in shards:
        path = folder / shard.file_name
        try:
            _write_shard(shard, contents, path, progress)
        except OSError as error:
            # Writing to a descriptor does not say which file it failed on.
            error.filename = error.filename or str(path)
            raise
    if len(shards) > 1:
        metadata = {"total_size": sum(shard.num_bytes for shard in shards)}
        if num_parameters is not None:
            metadata["total_parameters"] = num_parameters
        index = {
            "metadata": metadata,
            "weight_map": {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors},
        }
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _write_shard(shard: Shard, contents: Mapping[str, Writable], path: Path, progress: Progress) -> None:
    # Large elements first, so that every tensor is aligned to its own. Then those that fill whole pages, so that they
    # begin at one too: the kernel takes them several times as fast. Otherwise in the plan's order.
    tensors = sorted(
        shard.tensors,
        key=lambda tensor: (-DTYPES[tensor.dtype].itemsize, tensor.num_bytes % PAGE_BYTES != 0),
    )
    header = _header(tensors)
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        position = len(header)
        _reserve(file.fileno(), position + shard.num_bytes)
        for tensor in tensors:
            content = contents[tensor.name] if tensor.content is None else tensor.content
            written = _write_content(file.fileno(), position, tensor, content, progress)
            assert written == tensor.num_bytes, f"{tensor.name}: wrote {written} of {tensor.num_bytes} bytes"
            position += written
        os.fsync(file.fileno())


def _reserve(out_fd: int, num_bytes: int) -> None:
    """Reserve the file's space: a full disk shows before the first byte, and writing in any order is fast."""
    try:
        os.posix_fallocate(out_fd, 0, num_bytes)
    except (AttributeError, OSError) as error:
        # Not every system and file system can; without it the bytes go where they go.
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


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
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    return struct.pack("<Q", len(text)) + text


def _write_content(out_fd: int, position: int, tensor: PlannedTensor, content: Writable, progress: Progress) -> int:
    """Write `content` at `position` of a file and return its bytes."""
    if not isinstance(content, tuple):
        return _write_part(out_fd, position, tensor, content, progress)
    end = position
    # Equal parts in a row are computed once. One part is in memory at a time.
    for part, copies in groupby(content):
        end += _write_part(out_fd, end, tensor, part, progress, repeats=sum(1 for _ in copies))
    return end - position


def _write_part(
    out_fd: int,
    position: int,
    tensor: PlannedTensor,
    content: FileBytes | Tensor | Callable[[], Tensor],
    progress: Progress,
    repeats: int | None = None,
) -> int:
    """Write a part of `tensor` `repeats` times and return its bytes; without `repeats` it is the whole tensor."""
    if isinstance(content, FileBytes):
        content = replace(content, repeats=content.repeats * (repeats or 1))
        return _write_file_bytes(out_fd, position, content, progress)
    value = content if isinstance(content, Tensor) else content()
    assert repeats or tuple(value.shape) == tensor.shape, f"{tensor.name}: {tuple(value.shape)}, not {tensor.shape}"
    flat = value.to(DTYPES[tensor.dtype]).contiguous().view(-1).view(torch.uint8)
    for repeat in range(repeats or 1):
        _write_at(out_fd, memoryview(flat.numpy()), position + repeat * flat.numel())
        progress(flat.numel())
    return flat.numel() * (repeats or 1)


def _write_file_bytes(out_fd: int, position: int, content: FileBytes, progress: Progress) -> int:
    num_bytes = sum(span_bytes for _, _, span_bytes in content.spans)
    for source, begin, span_bytes in content.spans:
        with source.path.open("rb") as file:
            for copied in _copy_span(
                file.fileno(), source.offset + begin, span_bytes, out_fd, position, content.repeats, num_bytes
            ):
                progress(copied)
        position += span_bytes
    return num_bytes * content.repeats


def _copy_span(
    in_fd: int, offset: int, num_bytes: int, out_fd: int, position: int, repeats: int, stride: int
) -> Iterator[int]:
    """Copy bytes from `offset` to `position` and to the places `stride` bytes after, `repeats` in all.

    Yields the bytes just written.

    Each byte is read once and written from the processor's cache, which is why the buffer is small: twice as fast as
    letting the kernel copy the source again for every repeat.
    """
    buffer = memoryview(bytearray(min(BUFFER_BYTES, num_bytes)))
    copied = 0
    while copied < num_bytes:
        count = os.preadv(in_fd, [buffer[: num_bytes - copied]], offset + copied)
        if count == 0:
            raise OSError(errno.EIO, "the source file became shorter while it was read")
        for repeat in range(repeats):
            _write_at(out_fd, buffer[:count], position + copied + repeat * stride)
        copied += count
        yield count * repeats


def _write_at(out_fd: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(out_fd, data, position)
        data, position = data[written:], position + written
