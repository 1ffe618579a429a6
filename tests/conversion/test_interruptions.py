"""A conversion that is killed, terminated or interrupted, at each point where it makes a difference."""

import multiprocessing
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from dense_checkpoints import exit_status, folder_hashes
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_upcycled_moe import UpcycledQwenMoeConfig
from upcycled_moe.cli.main import main
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.streaming import writer
from upcycled_moe.conversion import convert as convert_module
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.source import open_source


class KillAtByte(Progress):
    """Sends `signal_number` to this process once `byte` bytes of the weights are written."""

    def __init__(self, byte, signal_number=signal.SIGKILL):
        self.remaining, self.signal_number = byte, signal_number

    def task(self, description, total, unit):
        return nullcontext(self.advance)

    def advance(self, num_bytes):
        self.remaining -= num_bytes
        if self.remaining <= 0:
            os.kill(os.getpid(), self.signal_number)


def kill_at_call(owner, name, number=1, after=False, signal_number=signal.SIGKILL):
    """Send `signal_number` to this process at the `number`-th call of `owner.name`, before or after it is done."""
    original, calls = getattr(owner, name), []

    def patched(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal_number)
        result = original(*arguments, **keywords)
        if len(calls) == number and after:
            os.kill(os.getpid(), signal_number)
        return result

    setattr(owner, name, patched)


# What kills a conversion to several shards, from the first byte to the last step.
POINTS = {
    "the first byte": lambda num_bytes: KillAtByte(1),
    "half of the bytes": lambda num_bytes: KillAtByte(num_bytes // 2),
    "the last byte": lambda num_bytes: KillAtByte(num_bytes),
    "before the index": lambda num_bytes: kill_at_call(writer, "write_text"),
    "before the provenance": lambda num_bytes: kill_at_call(convert_module, "write_provenance"),
    "before the card": lambda num_bytes: kill_at_call(convert_module, "write_card"),
    "before the configuration": lambda num_bytes: kill_at_call(UpcycledQwenMoeConfig, "save_pretrained"),
    "after the configuration": lambda num_bytes: kill_at_call(UpcycledQwenMoeConfig, "save_pretrained", after=True),
    "before the last rename": lambda num_bytes: kill_at_call(os, "replace"),
}


def convert_and_die(point, dense, recipe, out, overwrite=False):
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the life of the process
    source = open_source(str(dense))
    progress = POINTS[point](build_plan(source, recipe).num_bytes)
    convert(source, recipe, out, overwrite=overwrite, progress=progress)


def assert_nothing_loads(folder):
    for auto_class in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises((OSError, ValueError), match=r"config\.json|Repo id must be"):
            auto_class.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def undisturbed(dense, linear_recipe, tmp_path):
    """Source, recipe and hashes of a conversion to several shards that nobody disturbed."""
    source, recipe = dense(), linear_recipe(max_shard_size="200KB")
    out = convert(open_source(str(source)), recipe, tmp_path / "undisturbed").folder
    assert len(list(out.glob("*.safetensors"))) > 2
    return source, recipe, folder_hashes(out)


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_conversion_leaves_nothing_that_loads_and_can_be_run_again(undisturbed, tmp_path, point):
    source, recipe, expected = undisturbed
    out = tmp_path / "out"
    assert exit_status(convert_and_die, point, source, recipe, out) == -signal.SIGKILL
    assert (tmp_path / "out.partial").is_dir()
    for folder in (out, tmp_path / "out.partial"):
        assert_nothing_loads(folder)
    convert(open_source(str(source)), recipe, out)
    assert folder_hashes(out) == expected
    assert not (tmp_path / "out.partial").exists()


def test_before_the_last_rename_all_was_there(undisturbed, tmp_path):
    """The point above is the last one: what it leaves is whole but in no place that anything loads from."""
    source, recipe, expected = undisturbed
    exit_status(convert_and_die, "before the last rename", source, recipe, tmp_path / "out")
    assert folder_hashes(tmp_path / "out.partial" / "out") == expected


def die_between_the_renames(dense, recipe, out):
    kill_at_call(os, "replace", number=2)
    convert(open_source(str(dense)), recipe, out, overwrite=True)


@pytest.mark.parametrize("point", ["half of the bytes", "before the last rename", "between the renames"])
def test_a_killed_replacement_keeps_the_old_output(undisturbed, linear_recipe, tmp_path, point):
    source, recipe, expected = undisturbed
    out = tmp_path / "out"
    convert(open_source(str(source)), linear_recipe(seed=5), out)
    old = folder_hashes(out)
    if point == "between the renames":
        assert exit_status(die_between_the_renames, source, recipe, out) == -signal.SIGKILL
        assert folder_hashes(tmp_path / "out.partial" / "out.replaced") == old
    else:
        assert exit_status(convert_and_die, point, source, recipe, out, True) == -signal.SIGKILL
        assert folder_hashes(out) == old
    convert(open_source(str(source)), recipe, out, overwrite=True)
    assert folder_hashes(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def run_command(arguments, output, signal_number, number):
    """Run the command line and send it a signal when its `number`-th shard is written."""
    # A shell's background jobs, nohup and the like have it ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from upcycled_moe.cli.main import main

    sys.stdout = sys.stderr = output.open("w", encoding="utf-8", buffering=1)
    kill_at_call(writer, "_write_shard", number, after=True, signal_number=signal_number)
    sys.exit(main(arguments))


@pytest.mark.parametrize(
    ("signal_number", "status", "message"),
    [(signal.SIGINT, 130, "upcycled-moe: error: interrupted.\n"), (signal.SIGTERM, 143, "")],
)
@pytest.mark.parametrize("old_output", [False, True])
def test_a_signal_cleans_up(undisturbed, tmp_path, signal_number, status, message, old_output):
    source, _, _ = undisturbed
    out = tmp_path / "out"
    if old_output:
        out.mkdir()
        (out / "config.json").touch()
    arguments = ["convert", str(source), str(out), "--router", "linear", "--max-shard-size", "200KB", "--overwrite"]
    assert exit_status(run_command, arguments, tmp_path / "output", signal_number, 2) == status
    assert (tmp_path / "output").read_text(encoding="utf-8") == message
    assert not (tmp_path / "out.partial").exists()
    assert ([path.name for path in out.iterdir()] == ["config.json"]) if old_output else (not out.exists())


def run_with_small_files(arguments, output):
    """Run the command line where no file may be larger than 300 kB; the kernel then answers a write with EFBIG."""
    import resource

    from upcycled_moe.cli.main import main

    sys.stdout = sys.stderr = output.open("w", encoding="utf-8", buffering=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    sys.exit(main(arguments))


def test_a_write_that_fails_is_one_line_and_leaves_nothing(undisturbed, tmp_path):
    source, _, _ = undisturbed
    out = tmp_path / "out"
    arguments = ["convert", str(source), str(out), "--router", "linear"]
    assert exit_status(run_with_small_files, arguments, tmp_path / "output") == 1
    weights = tmp_path / "out.partial" / "out" / "model.safetensors"
    assert (tmp_path / "output").read_text(encoding="utf-8") == f"upcycled-moe: error: {weights}: File too large\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "undisturbed"]


def convert_and_wait(dense, recipe, out, reached, resume):
    """Convert, and at the first written byte say so and wait for leave to go on."""

    class Wait(Progress):
        def task(self, description, total, unit):
            return nullcontext(self.advance)

        def advance(self, num_bytes):
            reached.set()
            assert resume.wait(100)

    convert(open_source(str(dense)), recipe, out, progress=Wait())


@pytest.fixture
def conversion_under_way(undisturbed, tmp_path):
    """A process that stands in the middle of writing `out`, the event that lets it go on, source and recipe."""
    source, recipe, _ = undisturbed
    context = multiprocessing.get_context("forkserver")
    reached, resume = context.Event(), context.Event()
    arguments = (source, recipe, tmp_path / "out", reached, resume)
    process = context.Process(target=convert_and_wait, args=arguments)
    process.start()
    try:
        assert reached.wait(100)
        yield process, resume, source, recipe
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("checked", [True, False], ids=["before planning", "at the last moment"])
def test_a_second_conversion_to_the_same_output_is_refused(
    conversion_under_way, undisturbed, tmp_path, monkeypatch, capfd, checked
):
    process, resume, source, _ = conversion_under_way
    before = folder_hashes(tmp_path / "out.partial")
    if not checked:
        # As when both check before either writes.
        monkeypatch.setattr(convert_module, "check_output", lambda *arguments, **settings: None)
    assert main(["convert", str(source), str(tmp_path / "out"), "--router", "linear"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"upcycled-moe: error: {tmp_path / 'out'}: another command is writing it (in {tmp_path / 'out.partial'}); "
        "wait for it, or give another folder.\n"
    )
    assert folder_hashes(tmp_path / "out.partial") == before
    resume.set()
    process.join()
    assert process.exitcode == 0
    assert folder_hashes(tmp_path / "out") == undisturbed[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_a_killed_conversion_blocks_nobody(conversion_under_way, undisturbed, tmp_path):
    process, _, source, recipe = conversion_under_way
    process.kill()
    process.join()
    convert(open_source(str(source)), recipe, tmp_path / "out")
    assert folder_hashes(tmp_path / "out") == undisturbed[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]
