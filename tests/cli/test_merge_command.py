"""`upcycled-moe merge`: what it prints, what it writes, and how it ends."""

import json
import os
import re

import pytest
import torch
from dense_checkpoints import folder_hashes, write_dense
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def moe(dense, tmp_path_factory):
    """A converted checkpoint that no test writes into."""
    from upcycled_moe.conversion.convert import convert
    from upcycled_moe.conversion.recipe import ConversionRecipe
    from upcycled_moe.conversion.source import open_source

    out = tmp_path_factory.mktemp("merged") / "moe"
    convert(open_source(str(dense)), ConversionRecipe(router="linear", num_experts=4, shared_expert="plain"), out)
    return out


def _lines(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_merge_says_what_counts_how_much(upcycled_moe, moe, dense, tmp_path):
    status, out, err = upcycled_moe("merge", moe, tmp_path / "out", "--max-shard-size", "100KB")
    assert (status, err) == (0, "")
    assert _lines(out) == [
        "Coefficients: average",
        "Layer Least Most Entropy (at most 1.386) Shared expert",
        *(f"{layer} 0.250 0.250 1.386 0.200" for layer in range(3)),
        f"Wrote {tmp_path / 'out'} (Qwen2ForCausalLM): 454 kB, 113K parameters.",
    ]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_usage_is_measured_saved_and_given_again(upcycled_moe, moe, text_file, tmp_path):
    text = ("--data", text_file, "--tokens-per-domain", 128, "--block-size", 64)
    saved = tmp_path / "saved.json"
    arguments = ("merge", moe, tmp_path / "out", "--method", "usage", *text, "--save-coefficients", saved)
    status, out, err = upcycled_moe(*arguments)
    assert (status, err) == (0, "")
    assert _lines(out)[0] == "Coefficients: usage"
    assert _lines(out)[-2] == "Measured on 128 tokens of sample."
    given = ("--method", "coefficients", "--coefficients", saved)
    status, out, err = upcycled_moe("merge", moe, tmp_path / "again", *given, "--json")
    assert (status, err) == (0, "")
    printed = json.loads(out)
    assert printed["coefficients"] == json.loads(saved.read_text())
    step = json.loads((tmp_path / "out" / "upcycling.json").read_text())["steps"][-1]
    assert step["coefficients"] == printed["coefficients"]
    assert (step["num_tokens"], step["text"]["tokens_per_domain"]) == ({"sample": 128}, 128)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert sum(value.numel() for value in weights[0].values()) == printed["total_parameters"]
    # It is there by now.
    status, _, err = upcycled_moe(*arguments)
    assert (status, err) == (
        2,
        f"upcycled-moe: error: {saved}: exists; give another file, or --overwrite to replace it.\n",
    )


def test_matrices_of_their_own_have_rows_of_their_own(upcycled_moe, moe, tmp_path):
    halves, first = [0.5, 0.5, 0, 0], [1, 0, 0, 0]
    layers = {"0": halves, "1": {"gate_proj": halves, "up_proj": halves, "down_proj": first}, "2": first}
    path = tmp_path / "given.json"
    path.write_text(json.dumps({"format": 1, "layers": layers, "shared": {"0": 0, "1": 0.5, "2": 1}}))
    arguments = ("merge", moe, tmp_path / "out", "--method", "coefficients", "--coefficients", path, "--dry-run")
    status, out, err = upcycled_moe(*arguments)
    assert (status, err) == (0, "")
    assert _lines(out)[2:] == [
        "0 0.000 0.500 0.693 0.000",
        "1 gate_proj 0.000 0.500 0.693 0.500",
        "1 up_proj 0.000 0.500 0.693 0.500",
        "1 down_proj 0.000 1.000 0.000 0.500",
        "2 0.000 1.000 0.000 1.000",
        f"Would write {tmp_path / 'out'} (Qwen2ForCausalLM): 454 kB, 113K parameters.",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["given.json"]


def _learned(loss, *options):
    return ["--method", "learned", "--loss", loss, "--data", "texts", *options]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "usage"], "--method usage needs text; give --data."),
        (["--method", "coefficients"], "--method coefficients needs a file; give --coefficients."),
        (["--data", "x"], "--data has no meaning with --method average, only with usage and learned; leave it out."),
        (["--coefficients", "x"], "--coefficients has no meaning with --method average, only with coefficients;"),
        (["--block-size", "5"], "--block-size has no meaning without --data; give both or none."),
        (["--method", "usage", "--data", "x", "--batch-size", "0"], "batch_size=0 must be at least 1."),
        (["--method", "learnt"], "argument --method: invalid choice: 'learnt'"),
        (["--dry-run", "--save-coefficients", "x"], "--dry-run writes nothing; leave --save-coefficients out"),
        (["--save-coefficients", "no/x"], "no/x: cannot be a file; give --save-coefficients a path in a folder that"),
        (["--save-coefficients", "out"], "out: lies in out, which is written anew; give --save-coefficients another"),
        (
            ["--save-coefficients", "moe/config.json", "--overwrite"],
            "moe/config.json: lies in moe, which is read;",
        ),
        (
            ["--save-coefficients", "moe/new.json"],
            "moe/new.json: lies in moe, which is read;",
        ),
        (
            ["--method", "coefficients", "--coefficients", "a.json", "--save-coefficients", "a.json", "--overwrite"],
            "a.json: is read by this merge",
        ),
        (
            ["--method", "usage", "--data", "texts", "--save-coefficients", "texts/a.jsonl", "--overwrite"],
            "texts/a.jsonl: is read by this merge",
        ),
        (["--save-coefficients", "mine.json", "--overwrite"], "mine.json: holds no coefficients, so --overwrite does"),
        (
            ["--save-coefficients", "texts/a.jsonl", "--overwrite"],
            "a.jsonl: holds no coefficients, so",
        ),
        (["--method", "learned", "--data", "x"], "--method learned needs a loss, and data for it; give --loss."),
        (["--method", "learned", "--loss", "lm"], "--method learned needs a loss, and data for it; give --data."),
        (["--max-steps", "5"], "--max-steps has no meaning with --method average, only with learned; leave it out."),
        (_learned("lm", "--beta", "1"), "--beta has no meaning with --loss lm, only with dpo; leave it out."),
        (_learned("dpo", "--block-size", "8"), "--block-size has no meaning here, only with --loss lm; leave it out."),
        (
            _learned("lm", "--dtype", "float32"),
            "--dtype has no meaning here, only with --initial usage;",
        ),
        (
            _learned("lm", "--reference", "x"),
            "--reference has no meaning with --loss lm, only with dpo; leave it out.",
        ),
        (_learned("lm", "--max-steps", "0"), "max_steps=0 must be at least 1."),
        (_learned("lm", "--per", "model"), "per='model': choose one of layer, matrix for experts."),
        (_learned("bradley_terry"), "moe: loss='bradley_terry' needs a reward model"),
        (_learned("dpo", "--reference", "no/where/x"), "no/where/x: no such folder, and not a Hub id like org/name."),
        (_learned("dpo", "--reference", "texts"), "texts: there is no config.json"),
        (_learned("dpo"), "moe: its tokenizer has no chat template to read conversations with"),
        (_learned("lm", "--shared-expert-weight", "1"), "shared_expert_weight=1.0 is outside [0, 1)"),
        (["--with", "twin", "--method", "usage", "--data", "texts"], "--method usage merges experts by their"),
        (["--with", "twin", "--revision", "main"], "--revision has no meaning with --with; give a folder"),
        (["--with", "twin", *_learned("lm", "--per", "matrix")], "per='matrix': choose one of model, layer for whole"),
        (["--with", "twin", *_learned("lm", "--initial", "usage")], "initial='usage' is about experts;"),
        (
            ["--with", "twin", "--method", "coefficients", "--coefficients", "two.json"],
            "two.json: coefficients of model:",
        ),
        (["--with", "twin", "--method", "coefficients", "--coefficients", "a.json"], "a.json: format is None; this"),
        (["--with", "texts"], "texts: there is no config.json"),
        (["--max-shard-size", "5XB"], "max_shard_size='5XB' is not a size"),
        (["--method", "usage", "--data", "no.txt"], "no.txt"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(upcycled_moe, moe, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moe").symlink_to(moe)
    (tmp_path / "twin").mkdir()
    for path in moe.iterdir():
        (tmp_path / "twin" / path.name).symlink_to(path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "mine.json").write_text('{"format": 1, "layers": {}, "more": 1}')
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "two.json").write_text('{"format": 1, "groups": {"model": [0.5, 0.6]}}')
    before = folder_hashes(tmp_path) | folder_hashes(moe)
    status, out, err = upcycled_moe("merge", "moe", "out", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert folder_hashes(tmp_path) | folder_hashes(moe) == before


def test_a_place_that_cannot_be_written_is_told_before_the_work(upcycled_moe, moe, tmp_path, monkeypatch):
    saved = tmp_path / "locked" / "saved.json"
    saved.parent.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != saved.parent)
    status, out, err = upcycled_moe("merge", moe, tmp_path / "out", "--save-coefficients", saved)
    assert (status, out) == (2, "")
    assert err == f"upcycled-moe: error: {saved}: no permission to write in {saved.parent}; give another place.\n"
    assert not (tmp_path / "out").exists()


def test_brackets_in_the_name_of_a_domain_are_no_markup(upcycled_moe, moe, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "the of and to in is that", "domain": "[/math]"}\n')
    options = ("--method", "usage", "--data", path, "--dry-run")
    status, out, err = upcycled_moe("merge", moe, tmp_path / "out", *options)
    assert (status, err) == (0, "")
    assert _lines(out)[-2].endswith(" tokens of [/math].")


def test_out_has_a_name(upcycled_moe, moe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options in ((), ("--overwrite",)):
        status, out, err = upcycled_moe("merge", moe, "", *options)
        assert (status, out) == (2, "")
        assert "argument OUT: empty, which would be the folder that you are in; give a folder." in err
    assert list(tmp_path.iterdir()) == []


def test_a_dense_checkpoint_has_nothing_to_merge(upcycled_moe, dense, tmp_path):
    status, out, err = upcycled_moe("merge", dense, tmp_path / "out")
    assert (status, out) == (2, "")
    assert "model_type 'qwen2' is not that of an upcycled checkpoint" in err


def test_only_a_checkpoint_is_replaced(upcycled_moe, moe, tmp_path):
    out, saved = tmp_path / "out", tmp_path / "saved.json"
    out.mkdir()
    (out / "mine.txt").touch()
    status, _, err = upcycled_moe("merge", moe, out, "--overwrite", "--save-coefficients", saved)
    assert status == 2
    assert "holds no checkpoint" in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "out"]
    (out / "config.json").touch()
    assert upcycled_moe("merge", moe, out, "--overwrite", "--save-coefficients", saved)[0] == 0
    assert upcycled_moe("merge", moe, out, "--overwrite", "--save-coefficients", saved)[0] == 0
    assert (out / "model.safetensors").is_file()


@pytest.fixture
def lesson(text_file):
    """Flags to learn coefficients from a little text in two steps."""
    text = ("--data", text_file, "--tokens-per-domain", 1024, "--block-size", 32)
    return ("--method", "learned", "--loss", "lm", *text, "--max-steps", 2, "--learning-rate", 0.5)


def test_a_learned_merge_says_what_it_gained(upcycled_moe, moe, lesson, tmp_path):
    status, out, err = upcycled_moe(
        "merge", moe, tmp_path / "out", *lesson, "--shared-expert-weight", 0.3, "--seed", 1
    )
    assert status == 0
    # Experts that are copies are the same sum whatever they count.
    assert err.startswith("warning: No coefficient moved by 1% of itself (at most 0.00%)")
    assert err.count("\n") == 1
    lines = _lines(out)
    assert lines[0] == "Coefficients: learned"
    assert all(line.endswith(" 0.300") for line in lines[2:5])
    assert lines[5] == "Learned in 2 steps from 26 blocks, by lm."
    assert re.fullmatch(r"Coefficients moved by up to 0\.\d{3}, and by up to \d+% of what they were\.", lines[6])
    assert re.fullmatch(r"On \d+ blocks that were held out: loss \d\.\d{4} -> \d\.\d{4}\.", lines[7])
    written = {"merge_coefficients.json", "merge_fit.json", "merge_fit.png", "model.safetensors", "upcycling.json"}
    assert written <= {path.name for path in (tmp_path / "out").iterdir()}
    given = ("--method", "coefficients", "--coefficients", tmp_path / "out" / "merge_coefficients.json")
    assert upcycled_moe("merge", moe, tmp_path / "again", *given)[0] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]


def test_a_dry_run_checks_what_is_learned_from_and_learns_nothing(upcycled_moe, moe, lesson, tmp_path, monkeypatch):
    monkeypatch.setattr("upcycled_moe.merging.learning.fit_coefficients", pytest.fail)
    status, out, err = upcycled_moe("merge", moe, tmp_path / "out", *lesson, "--dry-run", "--json")
    assert (status, err) == (0, "")
    printed = json.loads(out)
    assert printed["coefficients"]["layers"]["0"] == [0.25] * 4
    assert printed["coefficients"]["shared"] == dict.fromkeys("012", 0.75)
    assert "fit" not in printed
    assert printed["coefficients_are_initial"] is True
    shown = upcycled_moe("merge", moe, tmp_path / "out", *lesson, "--dry-run")[1]
    assert _lines(shown)[0] == "Coefficients: where learning would start"
    assert list(tmp_path.iterdir()) == []
    missing = [str(value).replace("sample.txt", "missing.txt") for value in lesson]
    assert upcycled_moe("merge", moe, tmp_path / "out", *missing, "--dry-run")[0] == 2


def test_learning_that_is_interrupted_leaves_nothing(upcycled_moe, moe, lesson, tmp_path, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("upcycled_moe.merging.learning.fit_coefficients", interrupt)
    saved = ("--save-coefficients", tmp_path / "saved.json")
    status, out, err = upcycled_moe("merge", moe, tmp_path / "out", *lesson, *saved)
    assert (status, out) == (130, "")
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def others(dense, tmp_path_factory):
    """Two dense checkpoints of the architecture of `dense`."""
    folder = tmp_path_factory.mktemp("others")
    return [write_dense(folder / name, seed=seed) for seed, name in enumerate(("first", "second"), start=1)]


def test_whole_checkpoints_become_their_mean(upcycled_moe, dense, others, tmp_path):
    status, out, err = upcycled_moe("merge", dense, tmp_path / "out", "--with", *others)
    assert (status, err) == (0, "")
    assert _lines(out)[0] == "Coefficients: average"
    assert _lines(out)[2] == "model 0.333 0.333 0.333"
    sources = [load_file(folder / "model.safetensors") for folder in (dense, *others)]
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        mean = sum(source[name].double() for source in sources) / 3
        torch.testing.assert_close(value, mean.float(), rtol=1e-6, atol=1e-8)
    step = json.loads((tmp_path / "out" / "upcycling.json").read_text())["steps"][-1]
    assert [source["name"] for source in step["other_sources"]] == [str(folder) for folder in others]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**merge** with `first`, `second`, by `average`: each weight is the mean of theirs." in card
    linked = ", ".join(f"`{folder.name}`" for folder in (dense, *others))
    assert f"A dense language model.\nIt is a merge of {linked}." in card
    assert "trained from" not in card
    assert f"The terms of each of {linked} apply" in card
    status, _, err = upcycled_moe("merge", dense, tmp_path / "twice", "--with", dense)
    assert (status, err.count("\n")) == (2, 1)
    assert "is the same checkpoint as" in err


def test_what_whole_checkpoints_count_is_learned_saved_and_given_again(upcycled_moe, dense, others, lesson, tmp_path):
    saved = tmp_path / "saved.json"
    arguments = ("merge", dense, tmp_path / "out", "--with", *others, *lesson, "--save-coefficients", saved)
    status, out, err = upcycled_moe(*arguments, "--per", "layer", "--json")
    assert (status, err) == (0, "")
    printed = json.loads(out)
    assert printed["coefficients"] == json.loads(saved.read_text())
    assert set(printed["coefficients"]["groups"]) == {"rest", "layer 0", "layer 1", "layer 2"}
    assert printed["fit"]["largest_move"] > 0.05
    assert saved.read_bytes() == (tmp_path / "out" / "merge_coefficients.json").read_bytes()
    assert (tmp_path / "out" / "merge_fit.png").is_file()
    given = ("--method", "coefficients", "--coefficients", saved)
    status, out, err = upcycled_moe("merge", dense, tmp_path / "again", "--with", *others, *given)
    assert (status, err) == (0, "")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    # Of other checkpoints there are more.
    status, _, err = upcycled_moe("merge", dense, tmp_path / "more", "--with", others[0], *given)
    assert (status, err.count("\n")) == (2, 1)
    assert re.search(r"saved\.json: coefficients of [\w ]+: 3 numbers for 2 checkpoints; give one for each\.", err)
    # A file of them is replaced when asked to.
    assert upcycled_moe(*arguments, "--overwrite")[0] == 0
