"""What is said of the function of a fresh model, against its logits."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_upcycled_moe import SELECTIONS
from modeling_upcycled_moe.selection_upcycled_moe import Selection
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.experts import EXPERTS
from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.preservation import preservation
from upcycled_moe.conversion.source import open_source


# Largest |Δlogit| in float32 for logits of order one.
EXACT = 5e-6
# What is not the same function is far away; noise of 1 % is not.
DIFFERENT = {"approximate": (1e-4, 0.3), "none": (1e-2, 20)}

SPLIT = {"num_experts": 8, "experts": "split", "num_experts_per_tok": 2}
GROUPS = {"router_selection": "grouped_top_k"}
PROTOTYPES = {"router_selection": "prototype_top_k"}

CASES = {
    "copy": ({}, "exact", "experts are copies"),
    "one expert": ({"num_experts_per_tok": 1}, "exact", "experts are copies"),
    "sigmoid scores": ({"router_score_function": "sigmoid"}, "exact", "experts are copies"),
    "biased": ({"use_router_bias": True, "router_score_function": "sigmoid"}, "exact", "experts are copies"),
    "top_p": ({"router_selection": "top_p", "router_top_p": 0.4, "num_experts_per_tok": 3}, "exact", "copies"),
    "groups": ({**GROUPS, "num_expert_groups": 2}, "exact", "experts are copies"),
    "prototypes": ({**PROTOTYPES, "num_expert_groups": 2}, "exact", "experts are copies"),
    "mlp router": ({"router": "mlp"}, "exact", "experts are copies"),
    "grouped average": ({"router": "grouped_average"}, "exact", "experts are copies"),
    "some layers": ({"moe_layers": [1]}, "exact", "experts are copies"),
    "not normalised": ({"norm_topk_prob": False}, "none", "norm_topk_prob=false"),
    "expert choice": (
        {"router_selection": "expert_choice", "num_experts_per_tok": 1},
        "none",
        "in training, tokens that no expert chooses skip the layer",
    ),
    "noise": (
        {"experts": "noise"},
        "approximate",
        "noise of 0.01 standard deviations (KL from the parent on a small model: 2e-7 at 0.01, 2e-5 at 0.1, 5e-4",
    ),
    "drop": ({"experts": "drop", "drop_ratio": 0.25}, "none", "0.25 of its neurons redrawn"),
    "random": ({"experts": "random"}, "none", "experts are drawn at random"),
    "random backbone": ({"backbone": "random"}, "none", "all but the experts is drawn at random"),
    "all random": ({"backbone": "random", "experts": "random"}, "none", "all weights are drawn at random"),
    "zero experts": ({"num_zero_experts": 2}, "none", "without computation"),
    "copy experts": ({"num_copy_experts": 2}, "none", "without computation"),
    "constant experts": ({"num_constant_experts": 2}, "none", "without computation"),
    "sigmoid shared": ({"shared_expert": "sigmoid"}, "exact", "experts are copies"),
    "plain shared": ({"shared_expert": "plain"}, "exact", "experts are copies"),
    "complement shared": ({"shared_expert": "complement"}, "exact", "experts are copies"),
    "split": (SPLIT, "exact", "slices of a copy add up"),
    "split in four": ({**SPLIT, "expert_granularity": 4, "num_experts_per_tok": 4}, "exact", "slices"),
    "split in three": (
        {**SPLIT, "num_experts": 6, "expert_granularity": 3, "num_experts_per_tok": 3},
        "exact",
        "slices",
    ),
    "split, four active": ({**SPLIT, "num_experts_per_tok": 4}, "exact", "slices"),
    "split, mlp router": ({**SPLIT, "router": "mlp"}, "exact", "slices"),
    "split, sigmoid": ({**SPLIT, "router_score_function": "sigmoid"}, "exact", "slices"),
    "split, not normalised": ({**SPLIT, "norm_topk_prob": False}, "none", "norm_topk_prob=false"),
    "split, part of a copy": (
        {**SPLIT, "num_experts_per_tok": 3},
        "none",
        "num_experts_per_tok=3 is not a multiple of the 2 slices",
    ),
    "split, top_p": (
        {**SPLIT, "router_selection": "top_p", "router_top_p": 0.2, "num_experts_per_tok": 4},
        "none",
        "router_selection=top_p may select some slices",
    ),
    "split, a group a slice": ({**SPLIT, **GROUPS, "num_expert_groups": 2}, "exact", "slices"),
    "split, two groups a slice": (
        {**SPLIT, **GROUPS, "num_expert_groups": 4, "num_experts_per_tok": 4},
        "exact",
        "slices",
    ),
    "split, two slices a group": (
        {**SPLIT, **GROUPS, "expert_granularity": 4, "num_expert_groups": 2, "num_experts_per_tok": 4},
        "exact",
        "slices",
    ),
    "split, groups across": (
        {**SPLIT, **GROUPS, "num_experts": 12, "num_expert_groups": 3, "num_experts_per_tok": 6},
        "none",
        "num_expert_groups=3 cut through the 2 kinds of slices",
    ),
    "split, a prototype a slice": ({**SPLIT, **PROTOTYPES, "num_expert_groups": 2}, "exact", "slices"),
    "split, two slices a prototype": (
        {**SPLIT, **PROTOTYPES, "expert_granularity": 4, "num_expert_groups": 2, "num_experts_per_tok": 4},
        "exact",
        "slices",
    ),
    "split, sigmoid shared": ({**SPLIT, "shared_expert": "sigmoid"}, "exact", "slices"),
    "split, plain shared": ({**SPLIT, "shared_expert": "plain"}, "exact", "slices"),
    "split, complement shared": ({**SPLIT, "shared_expert": "complement"}, "exact", "slices"),
}


@torch.no_grad()
def logits(folder, tokens, *, train=False, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).train(train)
    return model(tokens).logits


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("settings", "level", "reason"), CASES.values(), ids=CASES)
def test_what_is_said_is_what_is_measured(dense, linear_recipe, tmp_path, tokens, family, settings, level, reason):
    folder = dense(family)
    plan = convert(open_source(str(folder)), linear_recipe(**settings), tmp_path / "out").plan
    assert plan.preserves_function == level
    assert reason in plan.preservation_reason
    assert plan.to_dict()["preservation_reason"] == plan.preservation_reason
    expected = logits(folder, tokens)
    assert 0.5 < expected.abs().max() < 5
    # The choice of experts is one in training only; there is no dropout.
    is_training = plan.config.router_selection == "expert_choice"
    difference = (logits(tmp_path / "out", tokens, train=is_training) - expected).abs().max().item()
    if level == "exact":
        assert difference <= EXACT
    else:
        least, most = DIFFERENT[level]
        assert least < difference < most


def test_several_models_are_none_of_them(dense, linear_recipe, tmp_path, tokens):
    folders = [dense(seed=seed) for seed in range(2)]
    recipe = linear_recipe(expert_sources=[str(folders[1])])
    plan = convert(open_source(str(folders[0])), recipe, tmp_path / "out").plan
    assert (plan.preserves_function, plan.preservation_reason) == ("none", "it joins 2 dense models")
    actual = logits(tmp_path / "out", tokens)
    assert all((actual - logits(folder, tokens)).abs().max() > 0.01 for folder in folders)


@pytest.mark.parametrize(("granularity", "level"), [(2, "exact"), (3, "approximate"), (4, "exact")])
def test_slices_times_three_round_in_sixteen_bits(dense, linear_recipe, tmp_path, tokens, granularity, level):
    folder = dense("qwen2", dtype=torch.bfloat16)
    recipe = linear_recipe(
        **GROUPS,
        num_expert_groups=granularity,
        experts="split",
        expert_granularity=granularity,
        num_experts=12,
        num_experts_per_tok=granularity,
    )
    plan = convert(open_source(str(folder)), recipe, tmp_path / "out").plan
    assert plan.preserves_function == level
    difference = (logits(tmp_path / "out", tokens) - logits(folder, tokens)).abs().max().item()
    assert (difference <= EXACT) == (level == "exact")
    if level == "approximate":
        assert "down projections times 3 are rounded to 16 bits (KL from the parent" in plan.preservation_reason
        assert difference < 0.1


def share_of_mixed_tokens(folder, granularity) -> float:
    """Return which part of 4096 tokens, in bfloat16, takes some slices of a copy and not the others."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    tokens = torch.randint(1, 320, (32, 128), generator=torch.Generator().manual_seed(2))
    hidden = model.model.embed_tokens(tokens)
    hidden = model.model.layers[0].post_attention_layernorm(hidden)
    selected = model.model.layers[0].mlp.gate(hidden)[2]  # [T, K]
    num_copies = model.config.num_experts // granularity
    slices = torch.nn.functional.one_hot(selected % num_copies, num_copies).sum(dim=1)  # [T, copies]
    return (slices % granularity != 0).any(dim=-1).double().mean().item()


@pytest.mark.parametrize("groups", [None, 2, 4, 8])
@torch.no_grad()
def test_copies_tie_in_sixteen_bits_unless_groups_hold_one_kind_of_slice(dense, linear_recipe, tmp_path, groups):
    folder = dense("qwen2", dtype=torch.bfloat16, vocab_size=320)
    grouped = {} if groups is None else {**GROUPS, "num_expert_groups": groups}
    recipe = linear_recipe(experts="split", expert_granularity=4, num_experts=32, num_experts_per_tok=8, **grouped)
    plan = convert(open_source(str(folder)), recipe, tmp_path / "out").plan
    mixed = share_of_mixed_tokens(tmp_path / "out", 4)
    if groups in (4, 8):
        assert (plan.preserves_function, mixed) == ("exact", 0)
    else:
        assert plan.preserves_function == "approximate"
        assert "copies can tie in 16 bits, and a token then mixes slices of two copies (about 0.3 % of tokens" in (
            plan.preservation_reason
        )
        assert "router_selection=grouped_top_k with num_expert_groups=4 rules it out" in plan.preservation_reason
        assert 0 < mixed < 0.02


def test_where_all_experts_are_active_none_can_tie(dense, linear_recipe):
    source = open_source(str(dense("qwen2", dtype=torch.bfloat16)))
    plan = build_plan(source, linear_recipe(experts="split", num_experts=4, num_experts_per_tok=4))
    assert plan.preserves_function == "exact"


def test_every_approximate_start_has_its_figure():
    for start in EXPERTS.values():
        assert (start.measured is not None) == (start.preserves_function == "approximate")


@pytest.mark.parametrize("experts", ["copy", "split"])
@pytest.mark.parametrize(
    ("facts", "level"),
    [
        ({}, "exact"),
        ({"is_grouped": True}, "exact"),
        ({"leaves_empty_slots": True}, "exact for copies"),
        ({"leaves_empty_slots": True, "in_evaluation": "top_k"}, "none"),
    ],
)
def test_a_new_selection_is_judged_by_its_facts(dense, linear_recipe, monkeypatch, experts, facts, level):
    recipe = linear_recipe(experts=experts)
    config = build_plan(open_source(str(dense())), recipe).config
    config = SimpleNamespace(**{**config.to_dict(), "router_selection": "new"})
    with pytest.raises(KeyError, match="new"):
        preservation(recipe, config, {"F32"})
    monkeypatch.setitem(SELECTIONS, "new", Selection(None, **facts))
    if level == "exact for copies":
        level = "exact" if experts == "copy" else "none"
    assert preservation(recipe, config, {"F32"}).level == level


def test_noise_grows_with_its_setting(dense, linear_recipe, tmp_path, tokens):
    differences = []
    for noise in (0.001, 0.01, 0.1):
        out = tmp_path / str(noise)
        convert(open_source(str(dense())), linear_recipe(experts="noise", expert_noise=noise), out)
        differences.append((logits(out, tokens) - logits(dense(), tokens)).abs().max().item())
    assert differences == sorted(differences)
    assert differences[1] / differences[0] == pytest.approx(10, rel=0.2)


def test_no_weight_is_read_to_say_so(dense, linear_recipe, monkeypatch):
    source = open_source(str(dense()))
    monkeypatch.setattr(type(next(iter(source.tensors.values()))), "load", lambda tensor: pytest.fail("read a weight"))
    assert build_plan(source, linear_recipe(**SPLIT)).preserves_function == "exact"
