import errno
import os
import shutil
import subprocess
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from dense_checkpoints import folder_hashes
from partial_outputs import leave_partial

from upcycled_moe.common.output_folder import OutputError, staged
from upcycled_moe.common.streaming import writer
from upcycled_moe.common.streaming.contents import Computed, FileBytes, joined, paired, scaled
from upcycled_moe.common.streaming.planned import PlannedTensor
from upcycled_moe.common.streaming.writer import write_weights
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.output import check_output
from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.source import open_source


@pytest.fixture
def plan(dense, linear_recipe):
    return build_plan(open_source(str(dense())), linear_recipe(max_shard_size="200KB"))


@pytest.fixture
def contents(plan):
    return {tensor.name: torch.ones(tensor.shape) for tensor in plan.tensors if tensor.content is None}


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
def test_folders_of_others_beside_the_output_stay(plan, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("all my work", encoding="utf-8")
    if name == "out.partial":
        for write in (
            lambda: check_output(plan, tmp_path / "out", overwrite=True),
            staged(tmp_path / "out").__enter__,
        ):
            with pytest.raises(OutputError, match=r"out\.partial, which holds other files; move them away"):
                write()
    else:
        for _ in range(2):
            with staged(tmp_path / "out") as folder:
                (folder / "config.json").touch()
    assert (tmp_path / name / "thesis.tex").read_text(encoding="utf-8") == "all my work"


def test_a_computed_tensor_may_be_made_when_it_is_written(plan, contents, tmp_path):
    for name, chosen in {"made": contents, "late": {name: lambda t=t: t for name, t in contents.items()}}.items():
        (tmp_path / name).mkdir()
        write_weights(plan.shards, chosen, tmp_path / name)
    assert folder_hashes(tmp_path / "made") == folder_hashes(tmp_path / "late")


def test_progress_counts_every_byte_once(plan, contents, tmp_path):
    advances = []
    write_weights(plan.shards, contents, tmp_path, advances.append)
    assert sum(advances) == plan.num_bytes


@pytest.mark.parametrize("buffer_bytes", [1, 1000, 2**20])
def test_the_bytes_do_not_depend_on_the_buffer(dense, tmp_path, monkeypatch, buffer_bytes):
    tensors = open_source(str(dense())).layer(0)
    gate, up = tensors["mlp.gate_proj.weight"], tensors["mlp.up_proj.weight"]
    content = FileBytes(((gate, 0, 700), (up, 1400, 1300)), repeats=3)
    monkeypatch.setattr(writer, "BUFFER_BYTES", buffer_bytes)
    advances = []
    with (tmp_path / "file").open("wb") as file:
        planned = PlannedTensor("experts", "F32", (3, 500), content)
        assert writer._write_content(file.fileno(), 10, planned, content, advances.append) == 6000
    one = gate.path.read_bytes()[gate.offset :][:700] + up.path.read_bytes()[up.offset + 1400 :][:1300]
    assert (tmp_path / "file").read_bytes() == bytes(10) + one * 3
    assert sum(advances) == 6000


def write_parts(path, shape, content, dtype="F32"):
    """Write one tensor and return its bytes, having checked that progress counts them."""
    advances = []
    with path.open("wb") as file:
        planned = PlannedTensor("experts", dtype, shape, content)
        written = writer._write_content(file.fileno(), 0, planned, content, advances.append)
    assert written == sum(advances) == path.stat().st_size == planned.num_bytes
    return path.read_bytes()


def test_parts_are_made_one_at_a_time_and_written_in_their_order(tmp_path):
    alive = []

    def make(number):
        assert all(reference() is None for reference in alive), "the part before is still in memory"
        tensor = torch.full((2, 3), float(number))
        alive.append(weakref.ref(tensor))
        return tensor

    content = joined(*(Computed((2, 3), make, (number,)) for number in range(4)))
    assert not alive
    written = write_parts(tmp_path / "file", (4, 2, 3), content)
    assert len(alive) == 4
    assert written == torch.arange(4.0).repeat_interleave(6).numpy().tobytes()


def test_equal_parts_in_a_row_are_computed_once(tmp_path):
    calls = []

    def make(number):
        calls.append(number)
        return torch.full((5,), float(number))

    content = joined(*(Computed((5,), make, (number,)) for number in (1, 1, 1, 2, 1)))
    written = write_parts(tmp_path / "file", (5, 5), content, dtype="BF16")
    assert calls == [1, 2, 1]
    expected = torch.tensor([1.0, 1, 1, 2, 1], dtype=torch.bfloat16).repeat_interleave(5)
    assert written == expected.view(torch.uint8).numpy().tobytes()


def test_bytes_of_the_source_and_computed_parts_mix(dense, tmp_path):
    tensors = open_source(str(dense())).layer(0)
    gate, up = tensors["mlp.gate_proj.weight"], tensors["mlp.up_proj.weight"]
    computed = Computed(gate.shape, torch.ones, (gate.shape,))
    halves = [FileBytes(((gate, number * gate.num_bytes // 2, gate.num_bytes // 2),)) for number in range(2)]
    pair = paired(FileBytes.whole(gate), FileBytes.whole(up))
    content = joined(pair, pair, computed, *halves, *halves, scaled(FileBytes.whole(up), 0.5))
    assert [getattr(part, "repeats", None) for part in content] == [2, None, 1, 1, 1, 1, None]
    written = write_parts(tmp_path / "file", (8, *gate.shape), content)
    expected = [gate.load(), up.load()] * 2 + [torch.ones(gate.shape)] + [gate.load()] * 2 + [up.load() / 2]
    assert written == torch.stack(expected).numpy().tobytes()


def test_a_part_of_the_wrong_size_is_noticed(plan, contents, tmp_path):
    name = next(iter(contents))
    contents[name] = (Computed((1,), torch.ones, ((1,),)),)
    with pytest.raises(AssertionError, match=r"wrote 4 of \d+ bytes"):
        write_weights(plan.shards, contents, tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_space_that_cannot_be_reserved_changes_nothing(plan, contents, tmp_path, monkeypatch, number):
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    write_weights(plan.shards, contents, tmp_path / "with")

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writer.os, "posix_fallocate", refuse)
    write_weights(plan.shards, contents, tmp_path / "without")
    assert folder_hashes(tmp_path / "with") == folder_hashes(tmp_path / "without")


def test_a_source_that_became_shorter_is_an_error(dense, linear_recipe, tmp_path):
    folder = shutil.copytree(dense(), tmp_path / "dense")
    source = open_source(str(folder))
    os.truncate(folder / "model.safetensors", 50_000)
    with pytest.raises(OSError, match="the source file became shorter while it was read"):
        convert(source, linear_recipe(), tmp_path / "out")
    assert entries(tmp_path) == ["dense"]


@pytest.mark.parametrize("failing_open", ["streamed", "computed"])
def test_a_full_device_is_an_error_that_names_the_file(plan, contents, monkeypatch, failing_open, tmp_path):
    """`/dev/full` answers every write with the kernel's own ENOSPC."""
    streamed = next(tensor for tensor in plan.tensors if isinstance(tensor.content, FileBytes))
    computed = next(tensor for tensor in plan.tensors if tensor.content is None)
    tensor = streamed if failing_open == "streamed" else computed
    content = tensor.content or contents[tensor.name]
    with Path("/dev/full").open("wb") as full, pytest.raises(OSError, match="No space left") as error:
        writer._write_content(full.fileno(), 0, tensor, content, lambda num_bytes: None)
    assert error.value.errno == errno.ENOSPC

    def full_device(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_write_content", full_device)
    with pytest.raises(OSError, match=r"No space left on device: .*model-00001-of-\d+\.safetensors"):
        write_weights(plan.shards, contents, tmp_path)


def test_a_disk_that_fills_up_leaves_nothing(dense, linear_recipe, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here; it needs the administrator's rights")
    try:
        # The disk looks large at the check and is full later, as when others write to it too.
        usage = namedtuple("usage", "total used free")(10**12, 0, 10**12)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match="No space left on device") as error:
            convert(open_source(str(dense())), linear_recipe(), disk / "out")
        assert error.value.errno == errno.ENOSPC
        assert entries(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_too_little_free_space_is_noticed_before_the_first_byte(plan, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 0, plan.num_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"needs 65\.\d MB, 1\.\d+ MB are free on its disk; make room"):
        convert(plan.source, plan.recipe, tmp_path / "new" / "out")
    assert entries(tmp_path) == []


def test_what_a_killed_run_left_counts_as_free(plan, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 0, 64 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    partial = leave_partial(tmp_path)
    (partial / "out" / "half").write_bytes(bytes(plan.num_bytes))
    check_output(plan, tmp_path / "out", overwrite=False)
    # An old output that the killed run had moved away comes back, and frees nothing.
    (partial / "out").rename(partial / "out.replaced")
    with pytest.raises(OutputError, match="make room"):
        check_output(plan, tmp_path / "out", overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_use_is_not_written_over(plan, tmp_path, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    check_output(plan, out, overwrite)
    (out / "config.json").touch()
    if overwrite:
        check_output(plan, out, overwrite)
    else:
        with pytest.raises(OutputError, match="exists and is not empty; give another folder, or --overwrite"):
            check_output(plan, out, overwrite)


def test_only_a_checkpoint_is_replaced(plan, tmp_path):
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "config.json").touch()  # below the top level it says nothing of the folder
    for write in (lambda: convert(plan.source, plan.recipe, out, overwrite=True), staged(out).__enter__):
        with pytest.raises(OutputError, match=r"holds no checkpoint \(config\.json or upcycling\.json\)"):
            write()
    assert entries(tmp_path) == ["out"]
    assert entries(out) == ["model"]
    (out / "upcycling.json").touch()
    convert(plan.source, plan.recipe, out, overwrite=True)
    assert "model" not in entries(out)


@pytest.mark.parametrize("name", ["~/text.txt", "~/*.txt", "~"])
def test_calibration_text_at_home_is_kept(dense, mixture_recipe, tmp_path, monkeypatch, name):
    home = tmp_path / "home"
    home.mkdir()
    (home / "text.txt").touch()
    (home / "config.json").touch()
    monkeypatch.setenv("HOME", str(home))
    plan = build_plan(open_source(str(dense())), mixture_recipe(calibration_data=[name]))
    with pytest.raises(OutputError, match="which replacing it would delete"):
        check_output(plan, home, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_outputs_that_would_destroy_something(dense, mixture_recipe, tmp_path, monkeypatch, overwrite):
    folder = shutil.copytree(dense(), tmp_path / "models" / "dense")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "text.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    plan = build_plan(
        open_source(str(folder)), mixture_recipe(calibration_data=[str(tmp_path / "texts" / "text.txt")])
    )
    for out, message in {
        folder: f"is the dense model {folder} itself",
        tmp_path / "link": f"is the dense model {folder} itself",
        folder / "moe": f"lies in the folder of the dense model {folder}; give a folder outside",
        tmp_path / "models": "which replacing it would delete",
        tmp_path / "texts": "which replacing it would delete",
        tmp_path / "work": "which replacing it would delete",
        Path(): "which replacing it would delete",
        tmp_path / "file": "is a file; give a folder that does not exist yet",
        tmp_path / "file" / "out": "is a file; give a folder that can be made",
    }.items():
        with pytest.raises(OutputError, match=message):
            check_output(plan, out, overwrite)


def test_a_parent_without_permission_to_write(plan, tmp_path, monkeypatch):
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o500)
    if os.access(parent, os.W_OK):
        # The administrator may write everywhere; ask as somebody else would be answered.
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != parent)
    with pytest.raises(OutputError, match=rf"no permission to write in {parent}"):
        check_output(plan, parent / "new" / "out", overwrite=False)
    assert entries(parent) == []
