"""Writing a checkpoint folder: streamed, and all or nothing."""

import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ..common.numbers import format_bytes
from ..common.settings import SettingsError
from .contents import Content, FileBytes
from .plan import ConversionPlan, Shard
from .source import DTYPES
from .tensors import PlannedTensor


BUFFER_BYTES = 1024**2
PAGE_BYTES = 4096
# What the files beside the weights may need: configuration, code, tokenizer, card.
COMPANION_BYTES = 64 * 1000**2

# Says that the folder it lies in is ours to delete; locked while a conversion writes there.
LOCK_FILE = "upcycled-moe.lock"
# Either marks a folder as a checkpoint, which `--overwrite` may replace.
CHECKPOINT_FILES = ("config.json", "upcycling.json")

# What can be written: what a plan holds, or a tensor, or what makes the tensor when it is written.
Writable = Content | Tensor | Callable[[], Tensor]
Progress = Callable[[int], None]


class OutputError(SettingsError):
    """The output folder cannot be written as asked."""


def check_output(plan: ConversionPlan, out: Path, overwrite: bool) -> None:
    """Check, before anything is written, that `out` is free to use and its disk large enough.

    Raises:
        OutputError: if not.
    """
    target = out.resolve()
    if target.is_file():
        raise OutputError(f"{out}: is a file; give a folder that does not exist yet.")
    for source in plan.sources:
        folder = source.folder.resolve()
        if target == folder:
            raise OutputError(f"{out}: is the dense model {source.name} itself; give another folder.")
        if target.is_relative_to(folder):
            raise OutputError(f"{out}: lies in the folder of the dense model {source.name}; give a folder outside.")
    check_kept(out, (*(source.folder for source in plan.sources), *plan.calibration_files, Path.cwd()))
    _check_replaceable(out, overwrite)
    # The output comes to be beside its final place, so its parent must be writable, or whatever there is of it.
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{out}: {parent} is a file; give a folder that can be made.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{out}: no permission to write in {parent}.")
    reclaimed = _leftover_bytes(out, staging_folder(target))
    needed, free = plan.num_bytes + COMPANION_BYTES, shutil.disk_usage(parent).free + reclaimed
    if free < needed:
        raise OutputError(
            f"{out}: needs {format_bytes(needed)}, {format_bytes(free)} are free on its disk; make room or write "
            "elsewhere."
        )


def check_kept(out: Path, paths: Iterable[Path]) -> None:
    """Check that none of `paths` lies in the folder `out`, where replacing it would delete them.

    Raises:
        OutputError: if one does.
    """
    target = out.resolve()
    for path in paths:
        if path.expanduser().resolve().is_relative_to(target):
            raise OutputError(
                f"{out}: holds {path.expanduser().resolve()}, which replacing it would delete; give another folder."
            )


def staging_folder(out: Path) -> Path:
    """Return the folder in which `out` comes to be, one level down, so that nothing ever loads from it."""
    return out.with_name(out.name + ".partial")


@contextmanager
def staged(out: Path, overwrite: bool = True) -> Iterator[Path]:
    """Give a fresh folder to write into, and put it in the place of `out` only if all went well.

    On an error the folder is removed. A killed run leaves `OUT.partial`, which does not load; the next run starts it
    anew. What was in `out` is there until the last moment, then for an instant in `OUT.partial`.

    Raises:
        OutputError: if another run is writing to `out`, or what is there may not be replaced.
    """
    shown, out = out, out.resolve()
    partial = staging_folder(out)
    with _locked(shown, partial):
        _bring_back(out)
        _check_replaceable(shown, overwrite)
        _clear(partial)
        folder = partial / out.name
        folder.mkdir()
        yield folder
        _sync(folder)
        # Once more: the folder may have changed since.
        _check_replaceable(shown, overwrite)
        _put_in_place(folder, out)
    _sync_path(out.parent)


@contextmanager
def _locked(out: Path, partial: Path) -> Iterator[None]:
    """Hold the folder `partial` for this run alone, and remove it afterwards.

    The kernel gives the lock back when its holder ends, however it ends; what a killed run leaves blocks nobody.
    """
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        _check_ours(out, partial)
        try:
            descriptor = os.open(partial / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its last holder has just removed the folder
        try:
            _lock(out, partial, descriptor, fcntl.LOCK_EX)
            if not _is_still(descriptor, partial / LOCK_FILE):
                continue  # locked, but by now another file, or none, has the name
            try:
                yield
            finally:
                _bring_back(out.resolve())
                # Still locked, and the lock last: who comes meanwhile finds a folder that is held, or an empty one.
                _clear(partial, ignore_errors=True)
                with suppress(OSError):
                    (partial / LOCK_FILE).unlink()
                    partial.rmdir()
            return
        finally:
            os.close(descriptor)


def _lock(out: Path, partial: Path, descriptor: int, operation: int) -> None:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{out}: another conversion is writing it (in {partial}); wait for it, or give another folder."
        ) from None
    except OSError as error:
        error.filename = str(partial / LOCK_FILE)
        raise


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _check_ours(out: Path, partial: Path) -> None:
    if not partial.is_dir():
        raise OutputError(f"{out}: is written by way of {partial}, which is a file; move it away.")
    # An empty one is what a run leaves that is killed between making the folder and the file, or removing them.
    if any(partial.iterdir()) and not (partial / LOCK_FILE).is_file():
        raise OutputError(f"{out}: is written by way of {partial}, which holds other files; move them away.")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out}: exists and is not empty; give another folder, or --overwrite to replace it.")
    if not any((out / name).is_file() for name in CHECKPOINT_FILES):
        raise OutputError(
            f"{out}: is not empty and holds no checkpoint ({' or '.join(CHECKPOINT_FILES)}), so --overwrite does not "
            "replace it; empty it yourself, or give another folder."
        )


def _clear(partial: Path, ignore_errors: bool = False) -> None:
    """Delete what is in our folder `partial` but its lock."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=ignore_errors)
        elif path.name != LOCK_FILE:
            path.unlink()


def write_weights(
    plan: ConversionPlan, contents: Mapping[str, Writable], folder: Path, progress: Progress = lambda num_bytes: None
) -> None:
    """Write the shards of `plan` and, last, their index.

    Args:
        contents: content of the planned tensors that have none yet, by name.
        progress: called with the bytes just written.
    """
    for shard in plan.shards:
        path = folder / shard.file_name
        try:
            _write_shard(shard, contents, path, progress)
        except OSError as error:
            # Writing to a descriptor does not say which file it failed on.
            error.filename = error.filename or str(path)
            raise
    if len(plan.shards) > 1:
        index = {
            "metadata": {"total_size": plan.num_bytes, "total_parameters": plan.total_parameters},
            "weight_map": {tensor.name: shard.file_name for shard in plan.shards for tensor in shard.tensors},
        }
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`."""
    path.write_text(text, encoding="utf-8", newline="\n")


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


def _replaced_folder(out: Path) -> Path:
    """Return where the old `out` is between being moved away and being deleted."""
    return staging_folder(out) / f"{out.name}.replaced"


def _put_in_place(folder: Path, out: Path) -> None:
    if not out.exists():
        os.replace(folder, out)
        return
    os.replace(out, _replaced_folder(out))
    os.replace(folder, out)


def _bring_back(out: Path) -> None:
    """Put the old output back if a run stopped between moving it away and the new one in."""
    if _replaced_folder(out).exists() and not out.exists():
        os.replace(_replaced_folder(out), out)


def _sync(folder: Path) -> None:
    """Have all files of `folder` on the disk, so that after a power cut too `out` is whole or absent."""
    for path in (*sorted(folder.rglob("*")), folder):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leftover_bytes(out: Path, partial: Path) -> int:
    """Return how much space the next run to `out` will free, having checked that nobody is using it.

    Raises:
        OutputError: if another run is, or the folder is not ours.
    """
    if not partial.exists():
        return 0
    _check_ours(out, partial)
    with suppress(FileNotFoundError):
        descriptor = os.open(partial / LOCK_FILE, os.O_RDWR)
        try:
            _lock(out, partial, descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)
    # What was in `out` goes back there.
    kept = _replaced_folder(out.resolve()) if not out.exists() else None
    return sum(
        path.stat().st_size
        for path in partial.rglob("*")
        if path.is_file() and not (kept and path.is_relative_to(kept))
    )
