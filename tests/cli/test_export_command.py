"""`upcycled-moe export` at the command line: what it prints, where, and its exit status."""

import json

import pytest
from moe_checkpoints import write_checkpoint

from upcycled_moe.export.obstacles import AUTO
from upcycled_moe.export.targets import TARGETS


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """Folder of an upcycled checkpoint with a mixture router; nobody may write into it."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "moe", "mixture")


@pytest.fixture(scope="module")
def top_p(tmp_path_factory):
    """Folder of an upcycled checkpoint that no stock architecture holds."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "top_p", "top-p")


def test_it_says_what_it_wrote(upcycled_moe, moe, tmp_path):
    status, output, errors = upcycled_moe("export", moe, tmp_path / "out")
    assert (status, errors) == (0, "")
    assert output.startswith("qwen2_moe (Qwen2MoeForCausalLM): the first of qwen3_moe, qwen2_moe, mixtral that")
    assert "\nNot qwen3_moe: it normalises queries and keys, and this model does not.\n" in output
    assert "\nNote: router_type='mixture' is folded" in output
    assert output.splitlines()[-1].startswith(f"Wrote {tmp_path / 'out'}: ")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_dry_run_says_the_same_and_writes_nothing(upcycled_moe, moe, tmp_path):
    out = tmp_path / "out"
    _, planned, _ = upcycled_moe("export", moe, out, "--dry-run", "--json")
    assert not list(tmp_path.iterdir())
    status, written, errors = upcycled_moe("export", moe, out, "--json", "--max-shard-size", "5GB")
    assert (status, errors) == (0, "")
    assert written == planned
    plan = json.loads(written)
    assert (plan["target"], plan["architecture"]) == ("qwen2_moe", "Qwen2MoeForCausalLM")
    size_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert plan["num_bytes"] == sum(shard["num_bytes"] for shard in plan["shards"]) <= size_bytes
    # A dry run finds what would stand in the way.
    status, _, errors = upcycled_moe("export", moe, out, "--dry-run")
    assert status == 2
    assert "--overwrite" in errors


def test_a_dry_run_says_where_it_would_go(upcycled_moe, moe, tmp_path):
    arguments = (moe, tmp_path / "out", "--dry-run", "--push-to-hub", "org/moe")
    status, output, _ = upcycled_moe("export", *arguments)
    assert status == 0
    assert output.endswith("\nWould push it to org/moe (private).\n")
    _, output, _ = upcycled_moe("export", *arguments, "--public", "--json")
    json.loads(output)


def test_what_is_not_exact_is_refused_in_one_line(upcycled_moe, moe, top_p, tmp_path):
    out = tmp_path / "out"
    for arguments, message in (
        (
            (moe, out, "--to", "mixtral"),
            "does not fit mixtral: all its layers have experts, and here 1 of 3 are dense",
        ),
        ((top_p, out), "no stock architecture computes what this model does: experts are selected by"),
    ):
        status, output, errors = upcycled_moe("export", *arguments)
        assert (status, output) == (2, "")
        assert message in errors
        assert errors.count("\n") == 1
    assert not out.exists()


def test_it_offers_every_architecture(upcycled_moe):
    _, output, _ = upcycled_moe("export", "--help")
    assert f"--to {{{','.join([*TARGETS, AUTO])}}}" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "olmoe"], "invalid choice: 'olmoe'"),
        (["--max-shard-size", "much"], "max_shard_size='much' is not a size"),
        (["--dtype", "bfloat16"], "unknown argument --dtype"),
    ],
)
def test_wrong_usage(arguments, message, upcycled_moe, moe, tmp_path):
    status, _, errors = upcycled_moe("export", moe, tmp_path / "out", *arguments)
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1


def test_what_is_no_upcycled_checkpoint_is_refused(upcycled_moe, dense, tmp_path):
    status, _, errors = upcycled_moe("export", dense, tmp_path / "out")
    assert status == 2
    assert "is not that of an upcycled checkpoint" in errors
    status, _, errors = upcycled_moe("export", tmp_path / "nowhere", tmp_path / "out")
    assert status == 2
    assert errors.count("\n") == 1
