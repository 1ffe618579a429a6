"""Do several dense checkpoints fit each other?"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from upcycled_moe.common.output_folder import OutputError
from upcycled_moe.common.streaming.stored import SourceError, StoredTensor
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.output import check_output
from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.source import open_source
from upcycled_moe.conversion.sources import check_fit, open_sources, split_revision


@pytest.fixture
def other(dense, tmp_path):
    """`other("qwen2", …)`: a copy of a second checkpoint that a test may spoil."""

    def copy(*arguments, **fields) -> Path:
        return shutil.copytree(dense(*arguments, **{"seed": 1, **fields}), tmp_path / "other")

    return copy


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 32}, "hidden_size is 32, not 64"),
        ({"intermediate_size": 128}, "intermediate_size is 128, not 96"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, not 3"),
        ({"num_attention_heads": 8}, "num_attention_heads is 8, not 4"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, not 2"),
        ({"vocab_size": 384}, "vocab_size is 384, not 320"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, not 1e-06"),
        ({"rope_theta": 5e4}, "rope_parameters.rope_theta is 50000.0, not 10000.0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, not True"),
        (
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "layer_types is ['full_attention', 'sliding_attention', 'sliding_attention'], not",
        ),
        ({"dtype": torch.bfloat16}, "model.embed_tokens.weight has type BF16, not F32; save both models in one type"),
    ],
)
def test_a_model_that_computes_differently_is_refused(dense, linear_recipe, monkeypatch, fields, message):
    source, other = open_source(str(dense())), dense(seed=1, **fields)
    monkeypatch.setattr(StoredTensor, "load", lambda tensor: pytest.fail("read a weight"))
    with pytest.raises(SourceError) as error:
        build_plan(source, linear_recipe(expert_sources=[str(other)]))
    assert f"expert_sources: {other} does not fit {source.name}: {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_scaled_rotary_embeddings_are_compared(other, tmp_path):
    """Only those depend on the length that the model is meant for."""
    second = other()
    first = shutil.copytree(second, tmp_path / "first")
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    edit_json(second / "config.json", lambda config: config.update(rope_parameters=scaling))
    with pytest.raises(SourceError, match=r"rope_parameters\.rope_type is 'yarn', not 'default'"):
        check_fit(open_source(str(first)), open_source(str(second)))
    edit_json(first / "config.json", lambda config: config.update(rope_parameters=scaling))
    check_fit(open_source(str(first)), open_source(str(second)))
    edit_json(second / "config.json", lambda config: config.update(max_position_embeddings=512))
    with pytest.raises(SourceError, match="max_position_embeddings is 512, not 256"):
        check_fit(open_source(str(first)), open_source(str(second)))


def test_another_family_is_refused(dense):
    with pytest.raises(SourceError, match="model_type is 'qwen3', not 'qwen2'; give checkpoints that were trained"):
        check_fit(open_source(str(dense())), open_source(str(dense("qwen3"))))


def add_token(tokenizer):
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 319, "content": "<|new|>"})


def swap_tokens(tokenizer):
    tokenizer["model"]["vocab"] |= {"a": tokenizer["model"]["vocab"]["b"], "b": tokenizer["model"]["vocab"]["a"]}


def drop_merge(tokenizer):
    tokenizer["model"]["merges"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_token, r"token '<\|new\|>' in tokenizer\.json is 319, not None"),
        (swap_tokens, r"token 'a' in tokenizer\.json is \d+, not \d+"),
        (drop_merge, r"the merges in their tokenizer\.json differ"),
    ],
)
def test_another_vocabulary_is_refused(dense, other, change, message):
    folder = other()
    edit_json(folder / "tokenizer.json", change)
    with pytest.raises(SourceError, match=message):
        check_fit(open_source(str(dense())), open_source(str(folder)))


def test_what_is_written_another_way_fits(dense, other):
    folder = other(max_shard_size="100KB")

    def rewrite(tokenizer):
        merges = tokenizer["model"]["merges"]
        tokenizer["model"]["merges"] = [" ".join(merge) if isinstance(merge, list) else merge for merge in merges]
        tokenizer["model"]["dropout"] = None
        tokenizer["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        tokenizer["added_tokens"][0]["normalized"] = True

    edit_json(folder / "tokenizer.json", rewrite)
    edit_json(
        folder / "config.json",
        lambda config: config.update(
            max_position_embeddings=64, eos_token_id=9, attention_dropout=0.1, use_cache=False
        ),
    )
    check_fit(open_source(str(dense())), open_source(str(folder)))


def test_vocabularies_are_compared_in_the_files_that_both_have(dense, other, tmp_path):
    first, second = shutil.copytree(dense(), tmp_path / "first"), other()
    for folder, vocabulary in ((first, {"a": 1}), (second, {"a": 2})):
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    check_fit(open_source(str(first)), open_source(str(second)))
    (second / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"token 'a' in vocab\.json is 2, not 1"):
        check_fit(open_source(str(first)), open_source(str(second)))
    (second / "vocab.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(SourceError, match=r"vocab\.json: not a tokenizer's vocabulary"):
        check_fit(open_source(str(first)), open_source(str(second)))
    (second / "vocab.json").unlink()
    check_fit(open_source(str(first)), open_source(str(second)))


def test_a_plan_without_weights_asks_for_none_of_the_others(dense, linear_recipe, monkeypatch):
    asked = []

    def record(model, revision=None, *, weights=True):
        asked.append((model, weights))
        return open_source(model, revision, weights=weights)

    monkeypatch.setattr("upcycled_moe.conversion.sources.open_source", record)
    other = str(dense(seed=1))
    for weights in (True, False):
        source = open_source(str(dense()), weights=weights)
        assert [opened.name for opened in open_sources(source, linear_recipe(expert_sources=[other]))] == [
            source.name,
            other,
        ]
    assert asked == [(other, True), (other, False)]


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_sources_folder_is_written_over(dense, other, linear_recipe, overwrite):
    folder = other()
    plan = build_plan(open_source(str(dense())), linear_recipe(expert_sources=[str(folder)]))
    with pytest.raises(OutputError, match=rf"{folder}: is the dense model {folder} itself"):
        check_output(plan, folder, overwrite)
    with pytest.raises(OutputError, match="which replacing it would delete"):
        check_output(plan, folder.parent, overwrite)
    with pytest.raises(OutputError, match=rf"lies in the folder of the dense model {folder}; give a folder outside"):
        check_output(plan, folder / "new" / "moe", overwrite)


def test_no_checkpoint_gives_experts_twice(dense, linear_recipe, tmp_path, monkeypatch):
    first, second = dense(), dense(seed=1)
    (tmp_path / "link").symlink_to(second)
    monkeypatch.chdir(tmp_path)
    for sources, named in (
        ([str(first)], f"{first} and {first}"),
        ([str(second), "link", str(first)], f"link and {second}"),
    ):
        with pytest.raises(SourceError, match=f"expert_sources: {named} are the same checkpoint; name each of them"):
            build_plan(open_source(str(first)), linear_recipe(expert_sources=sources))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", ("org/model", None)),
        ("org/model@v1", ("org/model", "v1")),
        ("org/model@refs/pr/1", ("org/model", "refs/pr/1")),
        ("folder@home", ("folder@home", None)),
        ("org/model@", ("org/model@", None)),
    ],
)
def test_a_source_may_name_its_revision(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder@home").mkdir()
    assert split_revision(name) == expected


def test_the_recorded_recipe_holds_the_commit_of_every_source(dense, linear_recipe, tmp_path, monkeypatch):
    local, other = str(dense(seed=1)), dense(seed=2)

    def open_hub_model(model, revision=None, *, weights=True):
        """`org/other` is on the Hub; its branch v1 is at commit 0123."""
        if model == local:
            return open_source(model, revision, weights=weights)
        assert (model, revision) in (("org/other", "v1"), ("org/other", "0123"))
        return dataclasses.replace(open_source(str(other)), name=model, revision="0123")

    monkeypatch.setattr("upcycled_moe.conversion.sources.open_source", open_hub_model)
    recipe = linear_recipe(expert_sources=[local, "org/other@v1"], num_experts=6)
    recorded = convert(open_source(str(dense())), recipe, tmp_path / "out").plan.recipe
    assert recorded.expert_sources == [local, "org/other@0123"]
    provenance = json.loads((tmp_path / "out" / "upcycling.json").read_text(encoding="utf-8"))
    assert provenance["recipe"]["expert_sources"] == [local, "org/other@0123"]
    assert [source["revision"] for source in provenance["expert_sources"]] == [None, "0123"]
    assert build_plan(open_source(str(dense())), recorded).recipe == recorded


def test_provenance_and_card_name_every_source(dense, linear_recipe, tmp_path):
    folders = [dense(seed=seed, max_shard_size="100KB") for seed in range(2)]
    result = convert(open_source(str(folders[0])), linear_recipe(expert_sources=[str(folders[1])]), tmp_path / "out")
    provenance = json.loads((tmp_path / "out" / "upcycling.json").read_text(encoding="utf-8"))
    (other,) = provenance["expert_sources"]
    assert (provenance["source"]["name"], other["name"]) == tuple(map(str, folders))
    assert set(other["sha256"]) == {path.name for path in folders[1].glob("*.safetensors")}
    assert provenance["source"]["sha256"] != other["sha256"]
    assert result.plan.to_dict()["expert_sources"] == [{"name": str(folders[1]), "revision": None}]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"upcycled from the dense models `{folders[0].name}`, `{folders[1].name}`\nwith routers by" in card
    assert "arxiv:2403.07816" in card
    assert "it does not compute what any of its parents computes: it joins 2 dense models" in card


def test_more_of_one_model_than_of_another_cannot_be(dense, linear_recipe):
    with pytest.raises(ValueError, match="num_experts=4 is not a multiple of the 3 dense checkpoints"):
        linear_recipe(expert_sources=["one", "two"])


def test_shards_of_the_result_do_not_change_the_experts(dense, linear_recipe, tmp_path):
    source, other = open_source(str(dense())), str(dense(seed=1))
    for name, size in (("one", "5GB"), ("many", "100KB")):
        convert(source, linear_recipe(expert_sources=[other], max_shard_size=size), tmp_path / name)
    one, many = (
        {name: tensor for path in (tmp_path / n).glob("*.safetensors") for name, tensor in load_file(path).items()}
        for n in ("one", "many")
    )
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
