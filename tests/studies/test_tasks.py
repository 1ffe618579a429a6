"""Tasks: each is done once, whatever is done again has a reason, and nothing half-written counts."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stages_of_test import append, fail, fill_folder, refuse
from tasks import TASK_FILE, Task, TaskError, busy_seconds, fingerprints, run_tasks, tasks_to_do

from upcycled_moe.common.settings import SettingsError


# Of the tasks of this test and of the study.
MODULE_FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "studies" / "router_upcycling")]


def chain(first="a", second="b", **options) -> list[Task]:
    """Two tasks, of which the second reads what the first wrote."""
    return [
        Task("one", append, {"text": first}, bulky=("text",)),
        Task("nested/two", append, {"text": second}, inputs=("one",), **options),
    ]


def names(tasks) -> list[str]:
    return [task.name for task in tasks]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder in which the chain is done, with its bulky file."""
    output = tmp_path_factory.mktemp("chain")
    run_tasks(chain(), output, 2, keep_bulky=True, announce=lambda line: None)
    return output


def test_a_task_reads_what_its_input_wrote(finished):
    assert (finished / "nested/two/text").read_text() == "ab"


def test_finished_tasks_are_not_done_again(finished):
    lines = []
    run_tasks(chain(), finished, 2, keep_bulky=True, announce=lines.append)
    assert lines == ["2 of 2 results are there already."]


def test_changed_settings_redo_a_task_and_what_follows(finished):
    assert names(tasks_to_do(chain(first="c"), finished)) == ["one", "nested/two"]
    assert names(tasks_to_do(chain(second="c"), finished)) == ["nested/two"]


def test_a_changed_file_redoes_a_task_and_its_place_does_not(tmp_path):
    (tmp_path / "x").write_text("1")
    (tmp_path / "y").write_text("1")
    (tmp_path / "z").write_text("2")
    by_file = {
        name: fingerprints([Task("one", append, {"text": ""}, files={"data": tmp_path / name})])["one"]
        for name in "xyz"
    }
    assert by_file["x"] == by_file["y"] != by_file["z"]


def test_bulky_files_go_when_no_task_reads_them_and_come_back_when_one_does(tmp_path):
    run_tasks(chain(), tmp_path, 1, announce=lambda line: None)
    assert not (tmp_path / "one/text").exists()
    assert (tmp_path / "nested/two/text").exists()
    assert tasks_to_do(chain(), tmp_path) == []
    # The first is unchanged, but the second has to read its file again.
    assert names(tasks_to_do(chain(second="c"), tmp_path)) == ["one", "nested/two"]


def test_a_folder_without_its_record_does_not_count(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "text").write_text("a")
    assert names(tasks_to_do(chain(), tmp_path)) == ["one", "nested/two"]


def test_a_failed_task_names_its_log_and_leaves_no_folder(tmp_path):
    with pytest.raises(TaskError, match=r"broken: ValueError: no luck; see .*logs/broken\.log") as error:
        run_tasks([Task("broken", fail, {})], tmp_path, 1, announce=lambda line: None)
    assert "\n" not in str(error.value)
    assert "Traceback" in (tmp_path / "logs/broken.log").read_text()
    assert not (tmp_path / "broken").exists()


def test_a_failed_task_stops_only_those_that_need_it(tmp_path):
    lines = []
    tasks = [
        Task("broken", fail, {}),
        Task("needs_it", append, {"text": "a"}, inputs=("broken",)),
        Task("needs_that", append, {"text": "a"}, inputs=("needs_it",)),
        Task("picky", refuse, {}),
        Task("other", append, {"text": "a"}),
    ]
    with pytest.raises(TaskError, match=r"^2 failed, 2 that need them did not run; the first: broken: ValueError"):
        run_tasks(tasks, tmp_path, 1, announce=lines.append)
    assert [line.split()[:2] for line in lines] == [
        ["Failed:", "broken:"],
        ["Failed:", "picky:"],
        ["[1/5]", "other,"],
    ]
    assert names(tasks_to_do(tasks, tmp_path)) == ["broken", "needs_it", "needs_that", "picky"]


def test_bulky_folders_go_whole(tmp_path):
    task = Task("one", fill_folder, {}, bulky=("model",))
    run_tasks([task], tmp_path, 1, announce=lambda line: None)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [TASK_FILE, "text"]
    assert json.loads((tmp_path / "one" / TASK_FILE).read_text())["cpu_seconds"] >= 0


def test_settings_that_a_task_refuses_are_the_users(tmp_path):
    with pytest.raises(SettingsError, match=r"^picky: give another\.$"):
        run_tasks([Task("picky", refuse, {})], tmp_path, 1, announce=lambda line: None)


def test_busy_seconds_count_overlaps_once_and_pauses_not_at_all(tmp_path):
    spans = {"one": (0.0, 10.0), "nested/two": (5.0, 12.0), "three": (100.0, 103.0)}
    for name, (began, ended) in spans.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / TASK_FILE).write_text(json.dumps({"began": began, "ended": ended}))
    assert busy_seconds([Task(name, append, {}) for name in spans], tmp_path) == 15.0


def test_after_a_kill_what_was_finished_stays_and_workers_end(tmp_path):
    _, worker = stopped_in_second_task(tmp_path, signal.SIGKILL)
    wait_until(lambda: not is_running(worker))
    again = [Task("one", append, {"text": "a"}), Task("two", append, {"text": "b"}, inputs=("one",))]
    assert names(tasks_to_do(again, tmp_path)) == ["two"]
    run_tasks(again, tmp_path, 1, announce=lambda line: None)
    assert (tmp_path / "two" / "text").read_text() == "ab"
    assert not (tmp_path / "two" / "pid").exists()


def test_an_interrupt_ends_workers_and_leaves_nothing_behind(tmp_path):
    errors, worker = stopped_in_second_task(tmp_path, signal.SIGINT)
    assert not is_running(worker)
    assert "KeyboardInterrupt" in errors
    assert "resource_tracker" not in errors


def stopped_in_second_task(folder: Path, number: signal.Signals) -> tuple[str, int]:
    """Run two tasks, send the signal in the second, and return the error output and the worker's process id."""
    script = folder / "run_chain.py"
    script.write_text(
        f"import signal, sys\nsys.path[:0] = {MODULE_FOLDERS!r}\n"
        # A job in the background may be started with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from stages_of_test import append, wait_for_ever\n"
        "from tasks import Task, run_tasks\n"
        "if __name__ == '__main__':\n"
        "    one, two = Task('one', append, {'text': 'a'}), Task('two', wait_for_ever, {}, inputs=('one',))\n"
        f"    run_tasks([one, two], Path({str(folder)!r}), 1)\n"
    )
    worker_file = folder / "two.partial" / "two" / "pid"
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen([sys.executable, str(script)], stderr=errors)
        wait_until(worker_file.exists)
        worker = int(worker_file.read_text())
        process.send_signal(number)
        process.wait()
        errors.seek(0)
        return errors.read(), worker


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
