"""Conversions from end to end for each router: what is written loads, computes what it should, and is reported."""

import random

import pytest
import torch
from fresh_models import TOLERANCE, Warnings, load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.conversion.calibration import calibrate, calibration_blocks
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.source import open_source


def gates(folder, name) -> list[torch.Tensor]:
    """Return the router tensor `name` of each layer."""
    tensors = load_file(folder / "model.safetensors")
    return [tensor for key, tensor in sorted(tensors.items()) if key.endswith(f".mlp.gate.{name}")]


@pytest.fixture(scope="module")
def domain_files(tmp_path_factory) -> list[str]:
    """Four files of different words, 6000 each."""
    folder = tmp_path_factory.mktemp("domains")
    vocabularies = {
        "numbers": " ".join(map(str, range(100, 400))),
        "prose": "the of and to in is that it was for with as have this from had",
        "code": "def( return{ if: else; for [i] += x= y= None lambda* import",
        "capitals": "ALPHA BETA GAMMA DELTA EPSILON ZETA ETA THETA IOTA KAPPA",
    }
    names = []
    for number, (name, words) in enumerate(vocabularies.items()):
        chosen = random.Random(number)
        path = folder / f"{name}.txt"
        path.write_text(" ".join(chosen.choice(words.split()) for _ in range(6000)), encoding="utf-8")
        names.append(str(path))
    return names


@pytest.fixture
def recipe_for(mixture_recipe, domain_files):
    """`recipe_for("domain", num_experts=4, …)`: a recipe with text for any router, one file for each domain."""

    def recipe(router="domain", num_domains=4, **settings):
        if router == "domain":
            settings = {"calibration_data": domain_files[:num_domains], **settings}
        return mixture_recipe(router=router, **settings)

    return recipe


ROUTERS = ["linear", "mixture", "mlp", "grouped_average", "domain"]
SLICES = {"experts": "split", "num_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("router", "settings"),
    [*((router, {}) for router in ROUTERS), *((router, SLICES) for router in ROUTERS if router != "grouped_average")],
)
@torch.no_grad()
def test_every_router_leaves_the_function_as_it_was(dense, recipe_for, tmp_path, tokens, router, settings, family):
    folder = dense(family)
    result = convert(open_source(str(folder)), recipe_for(router, **settings), tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.config.router_type == {"domain": "linear"}.get(router, router)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    assert 0.5 < expected.abs().max() < 5
    assert (model(tokens).logits - expected).abs().max().item() <= TOLERANCE
    assert [report.layer for report in result.routers] == [0, 1, 2]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("initial_std", ["none", 20.0])
@torch.no_grad()
def test_sigmoid_scores_of_raw_logits_keep_slices_together(
    dense, mixture_recipe, tmp_path, tokens, family, initial_std
):
    """Scores that are one in float32 still tell copies apart; a tie would mix slices of two of them."""
    folder = dense(family)
    recipe = mixture_recipe(**SLICES, router_score_function="sigmoid", router_logit_std=initial_std)
    result = convert(open_source(str(folder)), recipe, tmp_path / "out")
    assert result.plan.preserves_function == "exact"
    assert initial_std == "none" or all(report.logit_std > 19 for report in result.routers)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    assert (load(tmp_path / "out")(tokens).logits - expected).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("groups", [None, 2])
@torch.no_grad()
def test_under_a_bias_saturated_scores_mix_slices(dense, mixture_recipe, tmp_path, tokens, groups):
    grouped = {} if groups is None else {"router_selection": "grouped_top_k", "num_expert_groups": groups}
    recipe = mixture_recipe(
        **SLICES, **grouped, router_score_function="sigmoid", use_router_bias=True, router_logit_std=30.0
    )
    plan = convert(open_source(str(dense())), recipe, tmp_path / "out").plan
    expected = AutoModelForCausalLM.from_pretrained(dense()).eval()(tokens).logits
    difference = (load(tmp_path / "out")(tokens).logits - expected).abs().max().item()
    if groups is None:
        assert plan.preserves_function == "none"
        assert plan.preservation_reason.startswith("sigmoid scores of large logits are all one, and under use_router")
        assert difference > 1e-2
    else:
        assert plan.preserves_function == "exact"
        assert difference <= TOLERANCE


@pytest.mark.parametrize("initial_std", ["none", 1000.0])
@torch.no_grad()
def test_sigmoid_scores_of_raw_logits_are_finite_in_groups(dense, mixture_recipe, tmp_path, tokens, initial_std):
    """Scores of all experts of a group may vanish; their weights still sum to one."""
    recipe = mixture_recipe(
        router_score_function="sigmoid",
        router_selection="prototype_top_k",
        num_expert_groups=2,
        router_logit_std=initial_std,
    )
    folder, progress = dense("qwen3"), Warnings()
    convert(open_source(str(folder)), recipe, tmp_path / "out", progress=progress)
    actual = load(tmp_path / "out")(tokens).logits
    assert actual.isfinite().all()
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    assert (actual - expected).abs().max().item() <= TOLERANCE
    (message,) = (message for message in progress.messages if "gradient" in message)
    assert message == (
        "num_experts_per_tok=2: the weight of the only expert per group is always the same, so the language-modeling "
        "loss gives the routers no gradient; use 2 experts per group, or norm_topk_prob=false."
    )


@pytest.mark.parametrize(
    ("settings", "is_warned"),
    [
        ({"num_experts_per_tok": 1}, True),
        ({"num_experts_per_tok": 1, "norm_topk_prob": False}, False),
        ({"num_experts_per_tok": 1, "shared_expert": "complement"}, False),
        ({"num_experts_per_tok": 2}, False),
        ({"router_selection": "grouped_top_k", "num_expert_groups": 2}, False),
        ({"router_selection": "prototype_top_k", "num_expert_groups": 2}, True),
        ({"router_selection": "prototype_top_k", "num_expert_groups": 2, "norm_topk_prob": False}, False),
        ({"router_selection": "prototype_top_k", "num_expert_groups": 2, "num_experts_per_tok": 4}, False),
    ],
)
def test_routers_that_language_modeling_does_not_teach_are_warned_of(
    dense, linear_recipe, tmp_path, settings, is_warned
):
    progress = Warnings()
    convert(open_source(str(dense())), linear_recipe(**settings), tmp_path / "out", progress=progress)
    assert [message for message in progress.messages if "the routers no gradient" in message] == (
        progress.messages if is_warned else []
    )
    assert len(progress.messages) == is_warned


@pytest.mark.parametrize("router", ["linear", "mlp", "grouped_average"])
@torch.no_grad()
def test_routers_without_text_start_without_text(dense, linear_recipe, tmp_path, tokens, router):
    folder = dense()
    result = convert(open_source(str(folder)), linear_recipe(router=router), tmp_path / "out")
    assert result.routers is None
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    assert (load(tmp_path / "out")(tokens).logits - expected).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("num_routers", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("more", [{}, {"router_pooling": "max"}, {"head_grouping": "random"}, {"heads_per_router": 2}])
@torch.no_grad()
def test_the_papers_ablations_convert(dense, mixture_recipe, tmp_path, tokens, num_routers, more):
    """Tables 3 and 4 at a sixteenth of their width: 16 heads of 4 and 8 experts."""
    folder = dense("qwen1.5", num_attention_heads=16, num_key_value_heads=16)
    recipe = mixture_recipe(num_experts=8, num_routers=num_routers, router_logit_std="none", **more)
    convert(open_source(str(folder)), recipe, tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.config.num_routers == num_routers
    assert model.config.num_router_keys == max(num_routers, 8)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    assert (model(tokens).logits - expected).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize(
    ("router", "settings"),
    [
        ("mlp", {"router_logit_std": 1.0}),
        ("grouped_average", {}),
        ("domain", {"router_logit_std": 0.5}),
        ("linear", {"router_score_function": "sigmoid", "use_router_bias": True}),
        ("mixture", {"router_selection": "top_p", "router_top_p": 0.6, "num_experts_per_tok": 3}),
        ("mixture", {"router_selection": "grouped_top_k", "num_expert_groups": 2}),
        ("mixture", {"router_selection": "expert_choice"}),
        ("linear", {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2}),
        ("domain", {"num_zero_experts": 2}),
        ("mixture", {"num_experts": 8, "experts": "split", "num_experts_per_tok": 2, "num_copy_experts": 2}),
    ],
)
@torch.no_grad()
def test_the_report_is_what_the_loaded_routers_select(dense, recipe_for, tmp_path, router, settings):
    recipe = recipe_for(router, **settings)
    source = open_source(str(dense("qwen3")))
    result = convert(source, recipe, tmp_path / "out")
    model = load(tmp_path / "out")
    # The dense model's inputs of the FFN: experts without computation change what later layers of the MoE see.
    dense_model = AutoModelForCausalLM.from_pretrained(dense("qwen3")).eval()
    ffn_inputs = {}
    for number, layer in enumerate(dense_model.model.layers):
        layer.post_attention_layernorm.register_forward_hook(
            lambda _, __, output, number=number: ffn_inputs.update({number: output.flatten(0, 1)})
        )
    dense_model(calibration_blocks(source, recipe))
    num_experts = model.config.num_routed_experts
    for report in result.routers:
        logits, _, selected = model.model.layers[report.layer].mlp.gate(ffn_inputs[report.layer])
        counts = [0] * num_experts
        for token in selected.tolist():
            for expert in token:
                if expert < num_experts:
                    counts[expert] += 1
        total = sum(counts)
        # A near-tie may fall the other way.
        assert report.load == pytest.approx([count / total for count in counts], abs=2 / 512)
        assert report.dead_experts == sum(load == 0 for load in report.load)
        variance = sum(token.double().var(correction=0).item() for token in logits) / len(logits)
        assert report.logit_std == pytest.approx(variance**0.5, rel=1e-4)
        target = recipe.target_logit_std
        assert report.logit_std == pytest.approx(report.unscaled_logit_std if target is None else target, rel=1e-4)


@pytest.mark.parametrize("num_domains", [2, 4])
@torch.no_grad()
def test_text_of_a_domain_goes_to_its_experts(dense, recipe_for, tmp_path, num_domains):
    """Of a domain's tokens, more go to its own experts than of all tokens do, in every layer."""
    recipe = recipe_for(num_domains=num_domains, num_experts=8, calibration_tokens=2048)
    source = open_source(str(dense("qwen3")))
    convert(source, recipe, tmp_path / "out")
    model = load(tmp_path / "out")
    blocks = calibration_blocks(source, recipe)
    for router_logits in model(blocks, output_router_logits=True).router_logits:
        best = router_logits.argmax(dim=-1).view(num_domains, -1)  # [domains, tokens of each]
        domain_of_best = best * num_domains // 8
        for domain in range(num_domains):
            own = (domain_of_best[domain] == domain).double().mean()
            others = (domain_of_best == domain).double().mean()
            assert own > others, (domain, own, others)


@torch.no_grad()
def test_each_dense_model_has_the_experts_of_its_domain(dense, recipe_for, tmp_path):
    """Branch-Train-MiX: the first half of the experts is of the first model and of the first domain."""
    folders = [dense("qwen2"), dense("qwen2", seed=1)]
    recipe = recipe_for(num_domains=2, expert_sources=[str(folders[1])])
    source = open_source(str(folders[0]))
    convert(source, recipe, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    blocks = calibration_blocks(source, recipe)
    layers = calibrate(
        source, blocks, [0, 1, 2], attended=False, batch_size=3, device=torch.device("cpu"), num_domains=2
    )
    for layer in layers:
        mlp = f"model.layers.{layer.layer}.mlp."
        for expert in range(4):
            parent = load_file(folders[expert // 2] / "model.safetensors")
            assert torch.equal(tensors[f"{mlp}experts.down_proj"][expert], parent[f"{mlp}down_proj.weight"])
            # What is special in one of two domains is the opposite of what is in the other.
            special = layer.domain_means[expert // 2] - layer.domain_means[1 - expert // 2]
            row = tensors[f"{mlp}gate.weight"][expert].double()
            assert torch.cosine_similarity(row, special, dim=0) > 0.95


def test_the_same_seed_gives_the_same_routers(dense, recipe_for, tmp_path):
    source = open_source(str(dense("qwen2")))
    settings = {"mlp": {}, "domain": {"num_experts": 8}, "mixture": {"head_grouping": "random"}}
    for router, more in settings.items():
        for name, seed in (("one", 0), ("two", 0), ("other", 1)):
            convert(source, recipe_for(router, seed=seed, **more), tmp_path / router / name)
            torch.manual_seed(seed + 17)
        tensors = [load_file(tmp_path / router / name / "model.safetensors") for name in ("one", "two", "other")]
        one, two, other = ({name: tensor for name, tensor in t.items() if ".gate." in name} for t in tensors)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_keys_that_slices_share_are_no_fault(dense, mixture_recipe, tmp_path):
    progress = Warnings()
    recipe = mixture_recipe(num_experts=8, experts="split", calibration_tokens=2048)
    result = convert(open_source(str(dense("qwen1.5"))), recipe, tmp_path / "out", progress=progress)
    assert [report.coinciding_keys for report in result.routers] == [0, 0, 0]
    assert not [message for message in progress.messages if "coincide" in message]
    assert result.plan.config.num_router_keys == 8
    for keys in gates(tmp_path / "out", "keys"):
        assert torch.equal(keys[:4], keys[4:])


def test_keys_of_different_copies_that_coincide_are_counted_once(dense, mixture_recipe, tmp_path):
    progress = Warnings()
    recipe = mixture_recipe(num_experts=8, experts="split", key_statistic="mean")
    reports = convert(open_source(str(dense("qwen2"))), recipe, tmp_path / "out", progress=progress).routers
    # Four heads share two key-value heads.
    assert [report.coinciding_keys for report in reports] == [2, 2, 2]
    (message,) = [message for message in progress.messages if "coincide" in message]
    assert "(layer 0: 2 of 4)" in message


def test_dead_experts_count_over_all_that_are_routed_to(dense, recipe_for, tmp_path):
    progress = Warnings()
    # A standard deviation that leaves the first choice to one expert for nearly all tokens.
    recipe = recipe_for("linear", num_experts_per_tok=1, num_zero_experts=12, calibration_tokens=64)
    reports = convert(open_source(str(dense())), recipe, tmp_path / "out", progress=progress).routers
    most = max(report.dead_experts for report in reports)
    assert most > 0
    assert any(f"(most: {most} of 16)" in message for message in progress.messages)
    assert not any("num_routers" in message for message in progress.messages)


def test_parts_of_heads_are_named_where_experts_are_dead(dense, mixture_recipe, tmp_path):
    """64 experts on 16 heads: as many routers, of parts one dimension wide, leave more without a token than 16 do."""
    source, dead = open_source(str(dense("qwen1.5", num_attention_heads=16, num_key_value_heads=16))), {}
    for num_routers in (64, None):
        progress = Warnings()
        recipe = mixture_recipe(num_experts=64, num_routers=num_routers, moe_layers=[1], calibration_tokens=2048)
        result = convert(source, recipe, tmp_path / str(num_routers), progress=progress)
        dead[num_routers] = result.routers[0].dead_experts
        part_text = "num_routers=64 makes routers of parts of the 16 heads, and at most 16 are wider"
        assert any(part_text in message for message in progress.messages) == (num_routers == 64)
    assert dead[None] < 0.7 * dead[64]


def test_a_grouped_average_needs_equal_parts_of_the_token(dense, linear_recipe, tmp_path):
    with pytest.raises(SettingsError, match=r"num_experts=6 does not divide hidden_size=64"):
        convert(open_source(str(dense())), linear_recipe(router="grouped_average", num_experts=6), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("router", ["mixture", "linear", "mlp", "domain"])
@torch.no_grad()
def test_as_many_experts_as_there_may_be(dense, recipe_for, tmp_path, tokens, router):
    folder = dense("qwen1.5", num_attention_heads=16, num_key_value_heads=16)
    convert(open_source(str(folder)), recipe_for(router, num_experts=256, mlp_only_layers=[0, 1]), tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    assert (load(tmp_path / "out")(tokens).logits - expected).abs().max().item() <= TOLERANCE
