"""What arrives on the Hub, what does not, and what happens when the Hub refuses or fails."""

import errno
import shutil
from collections import Counter

import pytest
import torch
from dense_checkpoints import folder_hashes
from hub_stand_in import PART_BYTES, READ_TOKEN, TOKEN, Repository, running_hub, sha256
from huggingface_hub import snapshot_download
from moe_checkpoints import make_model
from pushed_checkpoints import SECRETS, leave_secrets
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.hub.destination import Destination, check_destination
from upcycled_moe.hub.errors import PushError, line
from upcycled_moe.hub.files import plan_upload
from upcycled_moe.hub.push import push, push_written


PRIVATE = Destination("org/moe")
PUBLIC = Destination("org/moe", private=False)


@pytest.fixture
def checkpoint(pushed_checkpoint, tmp_path):
    """A copy of the checkpoint to write into."""
    return shutil.copytree(pushed_checkpoint, tmp_path / "moe")


def weight_digests(folder):
    return {path.name: sha256(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))}


def test_what_comes_back_is_what_went_up(hub, pushed_checkpoint, tmp_path):
    result = push(plan_upload(pushed_checkpoint), PRIVATE)
    assert (result.url, result.is_private) == (f"{hub.endpoint}/org/moe", True)
    assert hub.repositories["org/moe"].is_private
    back = snapshot_download("org/moe", local_dir=tmp_path / "back")
    shutil.rmtree(tmp_path / "back" / ".cache")
    assert folder_hashes(tmp_path / "back") == folder_hashes(pushed_checkpoint)
    tokens = torch.arange(3, 40)[None]
    loaded = AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True)
    assert torch.equal(loaded(tokens).logits, make_model("mixture")(tokens).logits)


def test_secrets_are_never_named_nor_sent(hub, checkpoint):
    whole = folder_hashes(checkpoint)
    leave_secrets(checkpoint)
    push(plan_upload(checkpoint), PRIVATE)
    assert hub.files("org/moe").keys() == whole.keys()
    assert hub.log
    for request in hub.log:
        assert b"secret" not in request.body, request.path
        for name in (
            b"optimizer",
            b"rng_state",
            b"checkpoint-",
            b".env",
            b"training_args",
            b"private_photo",
            b"steal",
        ):
            # The code and settings that do go up are in the commit, in base64, so these are names.
            assert name not in request.path.encode() + request.body, request.path
    # Large files go by their digests.
    secrets = {sha256((checkpoint / name).read_bytes()) for name in SECRETS}
    assert hub.sent_objects()
    assert secrets.isdisjoint(hub.sent_objects())


def test_all_files_appear_in_one_commit(hub, pushed_checkpoint):
    push(plan_upload(pushed_checkpoint), PRIVATE)
    assert len(hub.repositories["org/moe"].branches["main"]) == 2
    assert hub.log[-1].path == "/api/models/org/moe/commit/main"


def test_a_second_push_sends_nothing_and_makes_no_commit(hub, pushed_checkpoint):
    first = push(plan_upload(pushed_checkpoint), PRIVATE)
    num_sent = len(hub.sent_objects())
    second = push(plan_upload(pushed_checkpoint), PRIVATE)
    assert len(hub.sent_objects()) == num_sent > 0
    assert len(hub.repositories["org/moe"].branches["main"]) == 2
    assert second.commit == first.commit


def test_an_upload_that_was_cut_goes_on_with_what_is_missing(hub, pushed_checkpoint):
    first, second, third = weight_digests(pushed_checkpoint).values()
    hub.fail = lambda request: "cut" if second in request.path else None
    with pytest.raises(PushError, match=r"^org/moe: the Hub cannot be reached \(\w+: .*\)\.$"):
        push(plan_upload(pushed_checkpoint), PRIVATE)
    assert hub.files("org/moe") == {}
    assert first in hub.sent_objects()
    assert not {second, third} & set(hub.sent_objects())
    hub.fail = lambda request: None
    hub.log.clear()
    push(plan_upload(pushed_checkpoint), PRIVATE)
    assert hub.sent_objects() == [second, third]
    assert hub.files("org/moe").keys() == folder_hashes(pushed_checkpoint).keys()


def test_a_large_file_goes_in_parts(hub, checkpoint):
    for path in checkpoint.glob("model*"):
        path.unlink()
    make_model("mixture").save_pretrained(checkpoint)
    content = (checkpoint / "model.safetensors").read_bytes()
    assert PART_BYTES < len(content) < 2 * PART_BYTES
    push(plan_upload(checkpoint), PRIVATE)
    assert hub.sent_objects().count(sha256(content)) == 2
    assert hub.files("org/moe")["model.safetensors"] == content


def test_weights_of_an_earlier_model_go(hub, checkpoint, tmp_path):
    push(plan_upload(checkpoint), PRIVATE)
    hub.files("org/moe")["notes.md"] = b"written there"
    for path in checkpoint.glob("model*.safetensors*"):
        path.unlink()
    make_model("linear").save_pretrained(checkpoint)
    result = push(plan_upload(checkpoint), PRIVATE)
    assert result.removed == (
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "model.safetensors.index.json",
    )
    assert [path for path in hub.files("org/moe") if path.startswith("model")] == [
        "modeling_upcycled_moe.py",
        "model.safetensors",
    ]
    assert hub.files("org/moe")["notes.md"] == b"written there"
    (tmp_path / "weights").write_bytes(hub.files("org/moe")["model.safetensors"])
    assert load_file(tmp_path / "weights").keys() == load_file(checkpoint / "model.safetensors").keys()


def test_what_loading_would_take_of_an_earlier_model_goes(hub, pushed_checkpoint):
    stale = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "added_tokens.json",
        "additional_chat_templates/old.jinja",
        "chat_template.json",
        "custom_generate/generate.py",
        "merges.txt",
        "model.fp16.safetensors",
        "processor_config.json",
        "pytorch_model.bin",
        "vocab.txt",
    }
    kept = {"notes.md", "LICENSE.md", "old/tokenizer.json", "figures/old.png", "old_code.py"}
    # On the branch that is pushed to, whatever is on the other one.
    hub.repositories["org/moe"] = Repository(True)
    hub.repositories["org/moe"].branches["next"] = [dict.fromkeys(stale | kept, b"earlier")]
    result = push(plan_upload(pushed_checkpoint), Destination("org/moe", "next"))
    assert set(result.removed) == stale
    assert hub.files("org/moe", "next").keys() == folder_hashes(pushed_checkpoint).keys() | kept


@pytest.mark.parametrize("change", ["weights", "tokenizer", "folder"])
def test_a_folder_that_changes_during_the_upload_shows_nothing(hub, checkpoint, change):
    *_, last = weight_digests(checkpoint).values()

    def write(request):
        if not request.path.startswith(f"/objects/{last}"):
            return
        if change == "weights":
            path = checkpoint / "model-00001-of-00003.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        elif change == "tokenizer":
            (checkpoint / "tokenizer.json").write_text("{}")
        else:
            shutil.copytree(checkpoint, checkpoint.with_name("new"))
            checkpoint.rename(checkpoint.with_name("old"))
            checkpoint.with_name("new").rename(checkpoint)

    upload = plan_upload(checkpoint)
    hub.fail = write
    with pytest.raises(PushError, match="changed during the upload, so nothing of it is shown; push again"):
        push(upload, PRIVATE)
    assert hub.files("org/moe") == {}


def test_a_folder_that_changes_after_it_was_planned_is_not_sent(hub, checkpoint):
    upload = plan_upload(checkpoint)
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(PushError, match=r"model-00002-of-00003\.safetensors: changed during the upload"):
        push(upload, PRIVATE)
    assert not set(weight_digests(checkpoint).values()) & set(hub.sent_objects())


def test_a_branch_is_made_and_main_stays(hub, pushed_checkpoint):
    for _ in range(2):
        result = push(plan_upload(pushed_checkpoint), Destination("org/moe", "step/100"))
        assert hub.files("org/moe") == {}
        assert hub.files("org/moe", "step/100").keys() == folder_hashes(pushed_checkpoint).keys()
        assert result.url == f"{hub.endpoint}/org/moe/tree/step%2F100"


def test_a_gitignore_there_keeps_nothing_out(hub, pushed_checkpoint):
    hub.repositories["org/moe"] = Repository(True, gitignore="model-00001-of-00003.safetensors config.json")
    push(plan_upload(pushed_checkpoint), PRIVATE)
    assert hub.files("org/moe").keys() == folder_hashes(pushed_checkpoint).keys()


def test_public_only_if_asked(hub, pushed_checkpoint):
    push(plan_upload(pushed_checkpoint), PUBLIC)
    assert not hub.repositories["org/moe"].is_private
    hub.log.clear()
    with pytest.raises(SettingsError, match="org/moe: is public on the Hub; give --public"):
        push(plan_upload(pushed_checkpoint), PRIVATE)
    assert not hub.asked("^(PUT|POST)")
    assert not hub.repositories["org/moe"].is_private


def test_a_private_repository_stays_so(hub, pushed_checkpoint):
    hub.repositories["org/moe"] = Repository(is_private=True)
    warnings = []
    progress = Progress()
    progress.warn = warnings.append
    assert push(plan_upload(pushed_checkpoint), PUBLIC, progress).is_private
    assert hub.repositories["org/moe"].is_private
    assert warnings == ["org/moe is private on the Hub and stays so; its owner can publish it there."]


@pytest.mark.parametrize(
    ("token", "repo_id", "error"),
    [
        ("hf_of_nobody", "org/moe", "the Hub does not know the token (401 Unauthorized"),
        (READ_TOKEN, "org/moe", "the token of writer may only read"),
        (TOKEN, "others/moe", "the Hub does not allow it (403 Forbidden: You don't have the rights to create"),
        (TOKEN, "org/theirs", "the Hub does not allow it (403 Forbidden: You don't have the rights to write"),
    ],
)
def test_what_is_not_allowed_is_one_line_without_the_token(hub, pushed_checkpoint, monkeypatch, token, repo_id, error):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.repositories["org/theirs"] = Repository(is_private=True, is_writable=False)
    with pytest.raises(SettingsError) as raised:
        push(plan_upload(pushed_checkpoint), Destination(repo_id))
    message = str(raised.value)
    assert message.startswith(f"{repo_id}: {error}")
    assert "\n" not in message
    assert token not in message
    assert not hub.sent_objects()


def test_a_token_that_is_given_is_the_one_that_counts(hub, pushed_checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    destination = Destination("org/moe", token=TOKEN)
    assert TOKEN not in repr(destination)
    push(plan_upload(pushed_checkpoint), destination)
    assert hub.files("org/moe")


@pytest.mark.parametrize("status", [500, 507])
def test_a_failing_hub_is_one_line_without_signed_addresses(hub, pushed_checkpoint, status):
    hub.fail = lambda request: status if request.method == "PUT" else None
    with pytest.raises(PushError) as raised:
        push_written(pushed_checkpoint, PRIVATE)
    message = str(raised.value)
    assert message.startswith(
        f"{pushed_checkpoint} is written, but not on the Hub: org/moe: the Hub failed ({status} "
    )
    assert message.endswith(f"Push it with `upcycled-moe push {pushed_checkpoint} org/moe`.")
    assert "Signature" not in message
    assert "\n" not in message
    # A moment's trouble is waited out, a lasting one is not. Another file may be on its way meanwhile.
    tries = Counter(request.path for request in hub.asked("^PUT"))
    assert max(tries.values()) == (6 if status == 500 else 1)


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_refusals_by_way_of_xet_are_told_as_others(hub, pushed_checkpoint, monkeypatch, status):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.fail = lambda request: status if "/xet-write-token/" in request.path else None
    with pytest.raises(SettingsError) as raised:
        push(plan_upload(pushed_checkpoint), PRIVATE)
    problem = "the Hub does not know the token" if status == 401 else "the Hub does not allow it"
    assert str(raised.value).startswith(f"org/moe: {problem} ({status} ")
    assert hub.endpoint not in str(raised.value)
    assert hub.asked("/xet-write-token/")
    assert hub.files("org/moe") == {}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("failed for url (https://cas.hf.co/x?X-Signature=secret)", "failed"),
        ("Request error: 500, domain: http://127.0.0.1:1/api", "Request error: 500"),
        ("two\nlines at https://hf.co/x?a=b", "two lines at"),
        ("https://hf.co", "no reason given"),
    ],
)
def test_no_address_is_shown(text, shown):
    assert line(text) == shown


def test_a_payment_that_is_due_is_a_refusal(hub, pushed_checkpoint):
    hub.fail = lambda request: 402 if request.path.endswith("/batch") else None
    with pytest.raises(SettingsError, match=r"^org/moe: the Hub does not allow it \(402 Payment Required"):
        push(plan_upload(pushed_checkpoint), PRIVATE)


def test_a_file_that_cannot_be_read_is_no_fault_of_the_hub(hub, pushed_checkpoint, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error", "model.safetensors")

    monkeypatch.setattr("upcycled_moe.hub.push.CommitOperationAdd", fail)
    with pytest.raises(OSError, match=r"Input/output error: 'model\.safetensors'") as raised:
        push(plan_upload(pushed_checkpoint), PRIVATE)
    assert not isinstance(raised.value, PushError)


def test_the_token_goes_where_the_client_sends_none_by_itself(hub, pushed_checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    push(plan_upload(pushed_checkpoint), PRIVATE)
    assert hub.files("org/moe")


@pytest.mark.parametrize("answer", [[], {"error": "who?"}, {"name": "writer", "auth": None}])
def test_what_is_no_hub_is_told_from_one_of_another_shape(hub, monkeypatch, answer):
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda api: answer)
    if "name" in answer:
        assert check_destination(PRIVATE) is None
        return
    with pytest.raises(PushError, match=f"^org/moe: no Hub answers at {hub.endpoint}.$"):
        check_destination(PRIVATE)


def test_settings_of_the_environment_that_cannot_be(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ключ")
    with pytest.raises(SettingsError, match="org/moe: HF_TOKEN has characters that no token has"):
        check_destination(PRIVATE)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "hub.example")
    with pytest.raises(SettingsError, match=r"HF_ENDPOINT=hub\.example is no address; begin it with https://"):
        check_destination(PRIVATE)
    assert not hub.log


@pytest.mark.parametrize(
    "branch", ["", "a b", "a..b", "refs/pr/1", "-x", "/x", "x/", "a//b", ".x", "a/.x", "x.lock", "@"]
)
def test_names_that_no_branch_has(branch):
    with pytest.raises(SettingsError, match="is no name of a branch"):
        Destination("org/moe", branch)


def test_a_full_quota_is_told_by_the_hubs_own_words(hub, pushed_checkpoint):
    hub.quota_bytes = 90_000
    with pytest.raises(PushError, match=r"^org/moe: the upload failed \(.*Storage quota exceeded\)\.$"):
        push(plan_upload(pushed_checkpoint), PRIVATE)
    assert hub.files("org/moe") == {}


def test_a_moments_trouble_is_waited_out(monkeypatch, pushed_checkpoint):
    waited = []
    with running_hub(monkeypatch, waits=waited.append) as hub:
        answers = iter([503, 503])
        hub.fail = lambda request: next(answers, None) if request.path.endswith("/batch") else None
        push(plan_upload(pushed_checkpoint), PRIVATE)
        assert hub.files("org/moe")
    assert len(waited) == 2


def test_a_card_that_the_hub_refuses_leaves_no_repository(hub, checkpoint):
    (checkpoint / "README.md").write_text(
        "---\nlicense: mit\nbase_model: no/such-model\n---\n# A model\n", encoding="utf-8"
    )
    with pytest.raises(SettingsError, match=r"README\.md: refused by the Hub \(.*base_model must exist"):
        push(plan_upload(checkpoint), PRIVATE)
    assert hub.repositories == {}


def test_without_token_and_without_network(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("upcycled_moe.hub.destination.get_token", lambda: None)
    with pytest.raises(SettingsError, match="no token for the Hub; log in with `hf auth login`, or set HF_TOKEN"):
        check_destination(PRIVATE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError, match="HF_HUB_OFFLINE=1 switches the Hub off; unset it to push"):
        check_destination(PRIVATE)
    assert not hub.log


def test_a_check_writes_nothing(hub):
    assert check_destination(PRIVATE) is None
    hub.repositories["org/moe"] = Repository(is_private=True)
    assert check_destination(PRIVATE) is True
    assert {request.method for request in hub.log} == {"GET"}


@pytest.mark.parametrize("repo_id", ["moe", "a/b/c", "org/mo e", "./moe", ""])
def test_names_that_no_repository_has(repo_id):
    with pytest.raises(SettingsError, match="is no repository of the Hub; write org/name"):
        Destination(repo_id)


def test_the_command_that_goes_on():
    destination = Destination("org/moe", "next", private=False)
    assert destination.command("my model") == "upcycled-moe push 'my model' org/moe --revision next --public"
