"""What experts are of an FFN: known from the recipe, or refused."""

import json
import shutil

import pytest
from moe_checkpoints import write_checkpoint

from upcycled_moe.common.moe_source import open_moe
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.merging.layout import ExpertLayout, expert_layout
from upcycled_moe.merging.merge import plan_merge
from upcycled_moe.merging.settings import MergeSettings


@pytest.fixture
def changed(tmp_path):
    """`changed(source, recipe={…}, without_provenance=True)`: a copy of a checkpoint that says something else."""

    def change(source, recipe=None, steps=(), without_provenance=False):
        folder = tmp_path / "changed"
        shutil.copytree(source.folder, folder)
        provenance = json.loads((folder / "upcycling.json").read_text())
        provenance["recipe"] |= recipe or {}
        provenance["steps"] = list(steps)
        (folder / "upcycling.json").write_text(json.dumps(provenance))
        if without_provenance:
            (folder / "upcycling.json").unlink()
        return open_moe(str(folder))

    return change


def test_slices_of_a_kind_stand_one_after_the_other(upcycled):
    _, source = upcycled("qwen2", experts="split", num_experts=6, expert_granularity=3, shared_expert="sigmoid")
    layout = expert_layout(source)
    assert layout == ExpertLayout((0, 1, 2), 6, 3, 96, 0.5, 1.0)
    assert layout.num_copies == 2
    assert [list(layout.slice_of(number)) for number in range(3)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"shared_expert": "plain"}, {"without_provenance": True}, "has a shared expert, and no upcycling.json"),
        ({"experts": "split"}, {"without_provenance": True}, "has experts narrower than the FFN, and no upcycling"),
        (
            {"experts": "split"},
            {"recipe": {"num_experts": 8}, "steps": [{"command": "prune", "num_experts": {"before": 8, "after": 6}}]},
            "was converted to 8 slices of FFNs and has 4 experts",
        ),
        (
            {"shared_expert": "plain"},
            {"recipe": {"shared_expert": "sigmoid"}},
            "says shared_expert='sigmoid', the mod",
        ),
        ({"experts": "split"}, {"recipe": {"num_experts": 8}}, "was converted to 8 slices of FFNs and has 4 experts"),
        ({"experts": "split", "moe_layers": [0]}, {"recipe": {"experts": "copy"}}, "experts make up FFNs of width 48"),
        (
            {"experts": "split", "shared_expert": "plain"},
            {"recipe": {"experts": "copy"}},
            "the shared expert is 96 wide, the routed ones make up an FFN of 48",
        ),
    ],
)
def test_what_is_not_known_is_not_guessed(upcycled, changed, settings, change, message):
    with pytest.raises(SettingsError, match=message):
        expert_layout(changed(upcycled("qwen2", **settings)[1], **change))


def test_narrow_experts_make_a_narrow_model_where_all_layers_have_them(upcycled, changed, tmp_path):
    source = changed(upcycled("qwen2", experts="split")[1], recipe={"experts": "copy"})
    plan = plan_merge(source, MergeSettings(), tmp_path / "out", 10**9)
    assert plan.derived.config.intermediate_size == 48


def test_slices_of_a_pruned_checkpoint_are_those_that_were_kept(upcycled, changed):
    _, source = upcycled("qwen2", experts="split")
    steps = [{"command": "prune", "num_experts": {"before": 8, "after": 4}}, {"command": "train"}]
    pruned = changed(source, recipe={"num_experts": 8}, steps=steps)
    assert expert_layout(pruned) == expert_layout(source)


def test_only_a_model_with_a_shared_expert_can_be_it_alone(tmp_path):
    source = open_moe(str(write_checkpoint(tmp_path / "moe", "linear")))
    with pytest.raises(SettingsError, match="has no shared expert; choose another method"):
        plan_merge(source, MergeSettings("shared"), tmp_path / "out", 10**9)
