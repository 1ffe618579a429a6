import json
import shutil

import pytest
from huggingface_hub import ModelCard


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory):
    from upcycled_moe.conversion.convert import convert
    from upcycled_moe.conversion.recipe import ConversionRecipe
    from upcycled_moe.conversion.source import open_source

    out = tmp_path_factory.mktemp("moe") / "out"
    convert(open_source(str(dense)), ConversionRecipe(router="linear", num_experts=4), out)
    return out


@pytest.fixture
def moe(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "moe")


def test_a_card_is_written_with_what_is_given(upcycled_moe, moe):
    options = ["--model-name", "Ours", "--license", "other", "--license-name", "mine", "--language", "en", "de"]
    status, out, err = upcycled_moe("card", moe, *options, "--datasets", "org/one", "org/two")
    assert (status, out, err) == (0, f"Wrote {moe / 'README.md'}.\n", "")
    card = ModelCard.load(moe / "README.md")
    assert (card.data.license, card.data.license_name, card.data.language) == ("other", "mine", ["en", "de"])
    assert card.data.datasets == ["org/one", "org/two"]
    assert card.text.startswith("\n# Ours\n")


def test_what_is_given_holds_until_a_card_begins_anew(upcycled_moe, moe):
    assert upcycled_moe("card", moe, "--license", "mit", "--datasets", "org/set")[0] == 0
    assert upcycled_moe("card", moe, "--language", "en")[0] == 0
    data = ModelCard.load(moe / "README.md").data
    assert (data.license, data.datasets, data.language) == ("mit", ["org/set"], ["en"])
    assert upcycled_moe("card", moe, "--overwrite")[0] == 0
    data = ModelCard.load(moe / "README.md").data
    assert (data.license, data.datasets, data.language) == (None, None, None)


def test_a_dry_run_prints_the_card_and_writes_nothing(upcycled_moe, moe):
    before = (moe / "README.md").read_bytes()
    status, out, err = upcycled_moe("card", moe, "--model-name", "Ours", "--dry-run")
    assert (status, err) == (0, "")
    assert "\n# Ours\n" in out
    assert (moe / "README.md").read_bytes() == before


def test_json_has_the_metadata(upcycled_moe, moe, tmp_path):
    path = tmp_path / "card.md"
    status, out, err = upcycled_moe("card", moe, "--output", path, "--license", "mit", "--json")
    assert (status, err) == (0, "")
    content = json.loads(out)
    assert content["metadata"] == ModelCard.load(path).data.to_dict()
    assert (content["file"], content["pictures"], content["written"]) == (str(path), [], True)


def test_a_card_that_was_edited_is_replaced_with_leave_only(upcycled_moe, moe):
    path = moe / "README.md"
    path.write_text(path.read_text(encoding="utf-8") + "\nMore by hand.\n", encoding="utf-8")
    for options in ([], ["--dry-run"]):
        status, out, err = upcycled_moe("card", moe, *options)
        assert (status, out) == (2, "")
        assert err == (
            f"upcycled-moe: error: {path}: was written or edited by hand; give --overwrite to replace it, or another "
            "file with --output.\n"
        )
    assert "More by hand." in path.read_text(encoding="utf-8")
    assert upcycled_moe("card", moe, "--overwrite")[0] == 0
    assert "More by hand." not in path.read_text(encoding="utf-8")


def test_reports_in_the_folder_are_taken(upcycled_moe, moe):
    one = {
        "name": "moe",
        "path": str(moe),
        "tasks": {},
        "averages": {},
        "domains": {"math": {"perplexity": 12.5, "num_tokens": 9}},
    }
    content = {"settings": {"perplexity_data": ["text"]}, "tasks": [], "checkpoints": [one]}
    (moe / "results.json").write_text(json.dumps(content), encoding="utf-8")
    assert upcycled_moe("card", moe)[0] == 0
    (result,) = ModelCard.load(moe / "README.md").data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("math", "perplexity", 12.5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["nowhere"], "nowhere: no such folder; give a checkpoint that is here."),
        (["."], "config.json; give the folder of a Transformers checkpoint."),
        (["moe", "--license-name", "x"], "--license-name has no meaning without --license; give both or none."),
        (["moe", "--license", "other"], "the card would not be valid: license: 'other' needs a license_name."),
        (["moe", "--evaluation", "no.json"], "no.json: cannot be read (No such file or directory)."),
        (
            ["moe", "--analysis", "moe/config.json"],
            "has no checkpoints, domains; give a file that `upcycled-moe analyze`",
        ),
        (["moe", "--output", "no/card.md"], "no/card.md: there is no folder no; make it first."),
        (["moe", "--output", "moe"], "moe: is a folder; give a file with --output, such as moe/README.md."),
        (["moe", "--model-name", ""], "--model-name '': must be one line of text."),
        (["moe", "--model-name", "a\nb"], "--model-name 'a\\nb': must be one line of text."),
        (["moe", "--evaluation", "a.json", "--evaluation", "./a.json"], "--evaluation names a file twice"),
    ],
)
def test_mistakes_are_one_line(upcycled_moe, moe, monkeypatch, options, problem):
    monkeypatch.chdir(moe.parent)
    before = (moe / "README.md").read_bytes()
    status, out, err = upcycled_moe("card", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert problem in err
    assert (moe / "README.md").read_bytes() == before
