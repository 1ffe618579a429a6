"""`upcycled-moe push`, and `--push-to-hub` of the commands that write a checkpoint."""

import json
import shutil
import signal
from types import SimpleNamespace

import pytest
from dense_checkpoints import folder_hashes
from hub_stand_in import Repository, running_hub
from pushed_checkpoints import leave_secrets, write_pushable

from upcycled_moe.common.numbers import format_bytes


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A checkpoint to push, in a folder with much else."""
    folder = write_pushable(tmp_path_factory.mktemp("pushed") / "moe")
    leave_secrets(folder)
    return folder


@pytest.fixture(scope="module")
def clean_moe(tmp_path_factory):
    """The same checkpoint alone."""
    return write_pushable(tmp_path_factory.mktemp("clean") / "moe")


@pytest.fixture(scope="module")
def files(clean_moe):
    """The files of the checkpoint."""
    return folder_hashes(clean_moe).keys()


@pytest.fixture
def hub(monkeypatch):
    with running_hub(monkeypatch) as server:
        yield server


def test_a_dry_run_lists_all_and_asks_nothing(upcycled_moe, hub, moe, files, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, out, err = upcycled_moe("push", moe, "org/moe", "--dry-run", "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)
    assert {file["path"] for file in plan["files"]} == files
    assert plan["num_bytes"] == sum(file["num_bytes"] for file in plan["files"])
    assert {"path": ".env", "reason": "hidden"} in plan["left_out"]
    assert (plan["repo_id"], plan["revision"], plan["visibility"]) == ("org/moe", "main", "private")
    status, out, _ = upcycled_moe("push", moe, "org/moe", "--dry-run", "--public", "--revision", "next")
    assert status == 0
    total = f"{len(files)} files, {format_bytes(plan['num_bytes'])}"
    assert out.endswith(f"Would push {total} to org/moe (branch next, public if new). Nothing was sent.\n")
    assert hub.log == []


def test_a_push_lists_what_went_and_where(upcycled_moe, hub, moe, files):
    status, out, err = upcycled_moe("push", moe, "org/moe", "--revision", "next")
    assert status == 0
    assert err.splitlines() == [
        f"{number} of 3: {path.name}, {format_bytes(path.stat().st_size)}"
        for number, path in enumerate(sorted(moe.glob("model-*-of-00003.safetensors")), start=1)
    ]
    assert hub.files("org/moe", "next").keys() == files
    assert out.splitlines()[-1].startswith(f"Pushed to {hub.endpoint}/org/moe/tree/next (private), commit ")
    status, out, _ = upcycled_moe("push", moe, "org/moe", "--json")
    assert status == 0
    result = json.loads(out)
    assert result["url"] == f"{hub.endpoint}/org/moe"
    assert (result["visibility"], result["removed"], len(result["commit"])) == ("private", [], 40)
    assert {file["path"] for file in result["files"]} == files == hub.files("org/moe").keys()


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["moe", "org/public"], 2, "org/public: is public on the Hub; give --public"),
        (["moe", "others/moe"], 2, "others/moe: the Hub does not allow it (403 Forbidden"),
        (["moe", "name"], 2, "'name' is no repository of the Hub; write org/name"),
        (["nowhere", "org/moe"], 2, "nowhere: no such folder"),
        (["moe", "org/broken"], 1, "org/broken: the Hub failed (500 Internal Server Error: no room)."),
    ],
)
def test_errors_are_one_line(upcycled_moe, hub, moe, monkeypatch, arguments, status, error):
    monkeypatch.chdir(moe.parent)
    hub.repositories["org/public"] = Repository(is_private=False)
    hub.fail = lambda request: 500 if "org/broken/preupload" in request.path else None
    assert upcycled_moe("push", *arguments)[0] == status
    _, out, err = upcycled_moe("push", *arguments)
    assert out == ""
    assert err.startswith(f"upcycled-moe: error: {error}")
    assert err.count("\n") == 1


def test_an_interrupted_push_says_how_to_go_on(upcycled_moe, moe, files, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    # The connection breaks at the second weight file, and while the client waits someone presses Ctrl-C.
    with running_hub(monkeypatch, waits=interrupt) as hub:
        answers = iter([None, None, None, "cut"])
        hub.fail = lambda request: next(answers, None) if request.method == "PUT" else None
        status, out, err = upcycled_moe("push", moe, "org/moe", "--public")
        assert (status, out) == (130, "")
        *_, way_on, last = err.splitlines()
        assert f"`upcycled-moe push {moe} org/moe --public` goes on" in way_on
        assert last == "upcycled-moe: error: interrupted."
        assert hub.files("org/moe") == {}
        num_sent = len(hub.sent_objects())
        assert upcycled_moe("push", moe, "org/moe", "--public")[0] == 0
        assert hub.files("org/moe").keys() == files
        # Two pictures and the first weight file had arrived.
        assert (num_sent, len(hub.sent_objects())) == (3, 5)


def test_a_conversion_is_pushed(upcycled_moe, hub, dense, tmp_path):
    recipe = ["--router", "linear", "--num-experts", "4"]
    status, out, _ = upcycled_moe("convert", dense, tmp_path / "out", *recipe, "--push-to-hub", "org/moe")
    assert status == 0
    assert hub.files("org/moe").keys() == folder_hashes(tmp_path / "out").keys()
    assert hub.repositories["org/moe"].is_private
    assert "Wrote " in out
    assert out.splitlines()[-1].startswith(f"Pushed to {hub.endpoint}/org/moe (private), commit ")


def test_an_export_is_pushed(upcycled_moe, hub, clean_moe, tmp_path):
    arguments = ["export", clean_moe, tmp_path / "out", "--push-to-hub", "org/native", "--public", "--json"]
    status, out, _ = upcycled_moe(*arguments)
    assert status == 0
    assert hub.files("org/native").keys() == folder_hashes(tmp_path / "out").keys()
    push = json.loads(out)["push"]
    assert (push["url"], push["visibility"]) == (f"{hub.endpoint}/org/native", "public")


def test_a_dry_run_of_an_export_pushes_nothing(upcycled_moe, hub, clean_moe, tmp_path):
    arguments = ["export", clean_moe, tmp_path / "out", "--push-to-hub", "org/native", "--dry-run"]
    for as_json in ([], ["--json"]):
        status, out, _ = upcycled_moe(*arguments, *as_json)
        assert status == 0
        assert "Pushed" not in out
    assert hub.log == []


def test_what_computes_otherwise_than_the_dense_model_is_not_pushed(upcycled_moe, hub, dense, tmp_path, monkeypatch):
    # As if the conversion had a fault.
    verified = SimpleNamespace(equal=False, to_dict=lambda: {"equal": False})
    monkeypatch.setattr("upcycled_moe.conversion.verify.verify", lambda *arguments: verified)
    arguments = ["convert", dense, tmp_path / "out", "--router", "linear", "--verify", "--push-to-hub", "org/moe"]
    status, out, _ = upcycled_moe(*arguments, "--json")
    assert status == 3
    assert json.loads(out)["verification"] == {"equal": False}
    assert "push" not in json.loads(out)
    assert hub.repositories == {}


def test_a_push_that_fails_keeps_the_json(upcycled_moe, hub, clean_moe, tmp_path):
    hub.fail = lambda request: 507 if request.method == "PUT" else None
    arguments = ["export", clean_moe, tmp_path / "out", "--push-to-hub", "org/native", "--json"]
    status, out, err = upcycled_moe(*arguments)
    assert status == 1
    output = json.loads(out)
    assert [output["architecture"]] == json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert "is written, but not on the Hub: org/native: the Hub failed (507 " in output["push"]["error"]
    assert output["push"]["error"] in err


def test_a_push_that_is_terminated_says_how_to_go_on(upcycled_moe, moe, monkeypatch):
    def terminate(seconds):
        raise SystemExit(128 + signal.SIGTERM)  # as the handler of the command line does

    with running_hub(monkeypatch, waits=terminate) as hub:
        hub.fail = lambda request: "cut" if request.method == "PUT" else None
        status, _, err = upcycled_moe("push", moe, "org/moe")
    assert status == 143
    assert f"`upcycled-moe push {moe} org/moe` goes on" in err


def test_the_folder_where_one_is_can_be_pushed(upcycled_moe, hub, clean_moe, files, monkeypatch):
    monkeypatch.chdir(clean_moe)
    assert upcycled_moe("push", ".", "org/moe")[0] == 0
    assert hub.files("org/moe").keys() == files


def test_names_are_shown_as_they_are(upcycled_moe, hub, clean_moe, tmp_path):
    folder = shutil.copytree(clean_moe, tmp_path / "[bold]moe")
    (folder / "[red]notes.txt").touch()
    _, out, _ = upcycled_moe("push", folder, "org/moe", "--dry-run")
    assert "[bold]moe" in out
    assert "[red]notes.txt" in out


@pytest.mark.parametrize("is_dry", [True, False])
def test_paths_of_the_machine_are_told_before_all_can_see_them(upcycled_moe, hub, clean_moe, tmp_path, is_dry):
    folder = shutil.copytree(clean_moe, tmp_path / "moe")
    (folder / "upcycling.json").write_text('{"source": {"name": "/home/someone/secret-project"}}')
    (folder / "training_config.yaml").write_text("train_data: [data, ~/corpora/x]\nurl: https://hf.co/a/b\n")
    (folder / "generation_config.json").write_text("{}")
    dry_run = ["--dry-run"] * is_dry
    _, _, err = upcycled_moe("push", folder, "org/moe", "--public", *dry_run)
    warning = "warning: to be seen by everyone, with paths of this machine: training_config.yaml, upcycling.json."
    assert err.splitlines()[0] == warning
    assert "warning" not in upcycled_moe("push", folder, "org/own", *dry_run)[2]


def test_a_push_that_cannot_be_is_refused_before_the_work(upcycled_moe, hub, dense, tmp_path):
    hub.repositories["org/moe"] = Repository(is_private=False)
    arguments = ["convert", dense, tmp_path / "out", "--router", "linear"]
    status, _, err = upcycled_moe(*arguments, "--push-to-hub", "org/moe")
    assert (status, err.count("\n")) == (2, 1)
    assert "org/moe: is public on the Hub" in err
    assert not (tmp_path / "out").exists()
    status, _, err = upcycled_moe(*arguments, "--public")
    assert status == 2
    assert "--public says who sees what --push-to-hub uploads" in err


def test_a_push_that_fails_leaves_the_conversion(upcycled_moe, hub, dense, tmp_path):
    hub.fail = lambda request: 507 if request.method == "PUT" else None
    out_folder = tmp_path / "out"
    status, out, err = upcycled_moe("convert", dense, out_folder, "--router", "linear", "--push-to-hub", "org/moe")
    assert status == 1
    *_, message = err.splitlines()
    assert f"Wrote {out_folder}" in out
    assert "is written, but not on the Hub: org/moe: the Hub failed (507 " in message
    assert message.endswith(f"Push it with `upcycled-moe push {out_folder} org/moe`.")
    assert (out_folder / "config.json").is_file()
