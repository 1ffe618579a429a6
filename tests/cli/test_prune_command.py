"""`upcycled-moe prune`: what it prints, what it writes, and how it ends."""

import json

import pytest
from dense_checkpoints import sample_text
from moe_checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """The models are small, and all that a process of tests holds takes a third of a second to go through."""
    monkeypatch.setattr("upcycled_moe.pruning.prune.free_memory", lambda: None)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A checkpoint that no test writes into."""
    return write_checkpoint(tmp_path_factory.mktemp("pruned") / "moe", "linear")


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text(sample_text(200), encoding="utf-8")
    return path


@pytest.fixture
def arguments(moe, short_text, tmp_path):
    """`arguments(*options)`: a short pruning to two experts in `tmp_path / "out"`."""

    def make(*options):
        text = ("--data", short_text, "--tokens-per-domain", 256, "--block-size", 64)
        return ["prune", moe, tmp_path / "out", "--num-experts", 2, *text, *options]

    return make


def test_tables_say_what_is_kept_and_what_it_costs(upcycled_moe, arguments, tmp_path):
    status, out, err = upcycled_moe(*arguments())
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    step = json.loads((tmp_path / "out" / "upcycling.json").read_text(encoding="utf-8"))["steps"][0]
    assert lines[:2] == [["Kept", "by", "reap"], ["Layer", "Kept", "score", "Experts"]]
    for line, layer in zip(lines[2:5], step["layers"], strict=True):
        share = sum(layer["scores"][expert] for expert in layer["kept"]) / sum(layer["scores"])
        assert line == [str(layer["layer"]), f"{share:.1%}", *map(str, layer["kept"])]
    before, after = step["loss"]["before"], step["loss"]["after"]
    figures = [
        f"{before['num_tokens']:,}",
        *(f"{loss['mean']:.4f}" for loss in (before, after)),
        *(f"{loss['perplexity']:.2f}" for loss in (before, after)),
    ]
    assert ["sample", *figures] in lines
    assert ["all", *figures] in lines
    assert "The loss on sample is on text that the scores come from too" in out
    assert lines[-1][:2] == ["Wrote", f"{tmp_path / 'out'}:"]


def test_json_holds_all_of_it(upcycled_moe, arguments, tmp_path):
    status, out, err = upcycled_moe(*arguments("--method", "merge", "--num-experts-per-tok", 1, "--json"))
    assert (status, err) == (0, "")
    printed = json.loads(out)
    step = json.loads((tmp_path / "out" / "upcycling.json").read_text(encoding="utf-8"))["steps"][0]
    assert printed["folder"] == str(tmp_path / "out")
    assert printed["num_bytes"] < (tmp_path / "out" / "model.safetensors").stat().st_size
    assert len(printed["notes"]) == 1
    for name in ("method", "num_experts", "num_experts_per_tok", "calibration_tokens", "loss", "layers"):
        assert printed[name] == step[name]
    assert printed["num_experts_per_tok"] == {"before": 2, "after": 1}
    for layer in printed["layers"]:
        assert sorted(expert for group in layer["groups"] for expert in group) == [0, 1, 2, 3]
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["num_experts"] == 2


def test_a_dry_run_shows_groups_and_writes_nothing(upcycled_moe, arguments, tmp_path):
    status, out, err = upcycled_moe(*arguments("--method", "merge", "--dry-run"))
    assert (status, err) == (0, "")
    assert "Experts, and those merged into them" in out
    assert "+" in out.splitlines()[2]
    assert out.splitlines()[-1].startswith("Would write ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-experts", 4], "num_experts=4 must be below the 4 experts"),
        (["--num-experts", 1], "exceeds the 1 experts that are left; keep more, or lower it (--num-experts-per-tok)."),
        (["--max-shard-size", "much"], "max_shard_size='much' is not a size"),
        (["--block-size", 100], "block_size=100 exceeds the 64 positions"),
        (["--eval-data", "missing.txt"], "missing.txt: no such file or folder"),
        (["--method", "random"], "argument --method: invalid choice: 'random'"),
    ],
)
def test_wrong_input_is_one_line_and_status_two(upcycled_moe, arguments, tmp_path, options, message):
    status, out, err = upcycled_moe(*arguments(*options))
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_in_the_way_is_kept_without_leave(upcycled_moe, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}", encoding="utf-8")
    status, _, err = upcycled_moe(*arguments())
    assert (status, (tmp_path / "out" / "config.json").read_text()) == (2, "{}")
    assert "exists and is not empty" in err
    assert upcycled_moe(*arguments("--overwrite"))[0] == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
