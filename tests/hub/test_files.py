"""Which files of a folder go to the Hub, and which folders are refused."""

import json
import shutil

import pytest
from dense_checkpoints import folder_hashes
from partial_outputs import leave_partial
from pushed_checkpoints import CARD, SECRETS, leave_secrets

from upcycled_moe.common.output_folder import LOCK_FILE
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.hub.files import plan_upload
from upcycled_moe.hub.parts import code_files


@pytest.fixture
def checkpoint(pushed_checkpoint, tmp_path):
    """A copy of the checkpoint to write into."""
    return shutil.copytree(pushed_checkpoint, tmp_path / "moe")


def names(upload):
    return {file.path for file in upload.files}


def test_all_of_a_checkpoint_goes_with_its_size(pushed_checkpoint):
    upload = plan_upload(pushed_checkpoint)
    assert names(upload) == folder_hashes(pushed_checkpoint).keys()
    assert upload.left_out == ()
    sizes = [path.stat().st_size for path in pushed_checkpoint.rglob("*") if path.is_file()]
    assert upload.num_bytes == sum(sizes)


def test_everything_else_stays_and_is_listed_with_the_reason(checkpoint):
    whole = folder_hashes(checkpoint)
    leave_secrets(checkpoint)
    for name in ("report.json", "report.html"):
        (checkpoint / name).write_text('{"format": 1}')
    upload = plan_upload(checkpoint)
    assert names(upload) == whole.keys()
    left_out = {entry.path: entry.reason for entry in upload.left_out}
    for secret in SECRETS:
        assert any(secret == path or (path.endswith("/") and secret.startswith(path)) for path in left_out), secret
    expected = {
        ".env": "hidden",
        ".cache/": "hidden",
        "figures/.hidden.png": "hidden",
        "checkpoint-10/": "checkpoint of a run, with its optimizer",
        "optimizer.pt": "state of a run",
        "runs/": "log",
        "results.json": "link",
        "report.json": "no report of our commands",
        "report.html": "no report of our commands",
        "NOTICE": "link",
        "linked": "link",
        "private_photo.png": "picture that the card does not show",
        "steal.py": "not known as part of a checkpoint",
        "model-00009-of-00009.safetensors": "weights that nothing loads",
    }
    assert expected.items() <= left_out.items()


def test_one_weight_file_goes_before_an_index_that_nothing_reads(checkpoint):
    # As Transformers loads them.
    shutil.copyfile(checkpoint / "model-00001-of-00003.safetensors", checkpoint / "model.safetensors")
    weights = [name for name in names(plan_upload(checkpoint)) if name.startswith("model.") or "-of-" in name]
    assert weights == ["model.safetensors"]


def test_code_goes_as_far_as_the_configuration_needs_it(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "other--code.Config"}}))
    assert not [name for name in names(plan_upload(checkpoint)) if name.endswith(".py")]


def test_reports_of_our_commands_go(checkpoint):
    whole = folder_hashes(checkpoint)
    (checkpoint / "results.json").write_text('{"checkpoints": [], "tasks": [], "settings": {}}')
    (checkpoint / "report.json").write_text('{"format": 1, "checkpoints": [], "domains": []}')
    (checkpoint / "report.html").write_text("<html>")
    assert names(plan_upload(checkpoint)) == {*whole, "results.json", "report.json", "report.html"}


def test_the_code_of_a_tokenizer_goes_with_what_it_imports(checkpoint):
    write_json(checkpoint / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "fast.Fast"]}})
    (checkpoint / "fast.py").write_text("from .words import Words\nimport .letters\n")
    for name in ("words.py", "letters.py"):
        (checkpoint / name).write_text("")
    assert {"fast.py", "words.py", "letters.py"} <= names(plan_upload(checkpoint))


@pytest.mark.parametrize(
    "shown",
    [
        "![](../outside/loads.png)",
        "![](.hidden.png)",
        "![](figures/../.hidden.png)",
        "![](checkpoint-10/loads.png)",
        "![](a.py)",
    ],
)
def test_a_card_can_show_nothing_that_must_stay(checkpoint, shown):
    whole = folder_hashes(checkpoint)
    for name in ("../outside/loads.png", ".hidden.png", "checkpoint-10/loads.png", "a.py"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"secret")
    (checkpoint / "README.md").write_text(CARD + shown, encoding="utf-8")
    assert names(plan_upload(checkpoint)) == whole.keys()


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def name_missing_code(folder):
    write_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["slow.Slow", None]}})


def name_code_elsewhere(folder):
    (folder.parent / "keys.py").touch()
    write_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": "../keys.Keys"}})


def link(name):
    def spoil(folder):
        (folder / name).symlink_to((folder / name).rename(folder.parent / "elsewhere"))

    return spoil


def spoil_card(folder):
    (folder / "README.md").write_text("---\nlicense: mine\n---\n# A model\n", encoding="utf-8")


def cut_short(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (shutil.rmtree, "moe: no such folder; give the folder of a checkpoint"),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"auto_map": 1}'), "auto_map is 1 instead of names"),
        (lambda folder: (folder / "model-00001-of-00003.safetensors").unlink(), "the shard is missing"),
        (cut_short, "model-00002-of-00003.safetensors: truncated"),
        (
            lambda folder: (folder / "README.md").unlink(),
            "there is no card (README.md); write one with `upcycled-moe card",
        ),
        (
            lambda folder: (folder / "README.md").write_text("---\ntags: 3\n---\n"),
            "README.md: metadata: cannot be read",
        ),
        (spoil_card, "README.md: license: 'mine' is not in the Hub's list; take 'other', with"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: (folder / LOCK_FILE).touch(), "is what a command has not finished writing"),
        *(
            (link(name), f"{name}: is a link, and only plain files go to the Hub")
            for name in (
                "model-00003-of-00003.safetensors",
                "README.md",
                "tokenizer.json",
                "routers_upcycled_moe.py",
                "additional_chat_templates/tools.jinja",
            )
        ),
        (link("additional_chat_templates"), "tools.jinja: is a link, and only plain files go to the Hub"),
        (name_missing_code, "tokenizer_config.json: needs slow.py, which is not beside it"),
        (name_code_elsewhere, "tokenizer_config.json: needs ../keys.py, which is not beside it"),
        (
            lambda folder: (folder / "routers_upcycled_moe.py").unlink(),
            "modeling_upcycled_moe.py: needs routers_upcycled_moe.py, which is not beside it",
        ),
        (
            lambda folder: (folder / "routers_upcycled_moe.py").write_bytes(b"# \xff"),
            "routers_upcycled_moe.py: not UTF-8",
        ),
        (lambda folder: (folder / "README.md").write_bytes(b"\xff"), "README.md: not UTF-8"),
        (lambda folder: (folder / "router_loads.png").unlink(), "picture: router_loads.png is not in"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(checkpoint, spoil, error):
    spoil(checkpoint)
    with pytest.raises(SettingsError) as raised:
        plan_upload(checkpoint)
    assert error in str(raised.value)


def test_what_a_killed_command_left_is_refused(checkpoint):
    checkpoint.rename(checkpoint.parent / "out")
    partial = leave_partial(checkpoint.parent)
    with pytest.raises(SettingsError, match="a command is replacing it, or was killed as it did"):
        plan_upload(checkpoint.parent / "out")
    shutil.rmtree(partial / "out")
    (checkpoint.parent / "out").rename(partial / "out")
    for unfinished in (partial, partial / "out"):
        with pytest.raises(SettingsError, match="is what a command has not finished writing"):
            plan_upload(unfinished)


def test_a_folder_that_is_replaced_while_it_is_read_is_refused(checkpoint, monkeypatch):
    def replace(folder):
        shutil.copytree(checkpoint, checkpoint.with_name("new"))
        checkpoint.rename(checkpoint.with_name("old"))
        checkpoint.with_name("new").rename(checkpoint)
        return code_files(folder)

    # After some of it has been checked.
    monkeypatch.setattr("upcycled_moe.hub.files.code_files", replace)
    with pytest.raises(SettingsError, match="moe: changed while it was read; wait for what writes there"):
        plan_upload(checkpoint)
