import re
import shutil

import pytest
from huggingface_hub import ModelCard

from upcycled_moe.common.numbers import format_bytes, format_count
from upcycled_moe.conversion.card import planned_checkpoint
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.papers import PAPERS
from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.recipe import GIVEN, ConversionRecipe
from upcycled_moe.conversion.routers import ROUTER_INITIALIZERS
from upcycled_moe.conversion.source import DenseSource, open_source
from upcycled_moe.model_cards.card import render_card


def test_the_card_has_the_reports_figures(dense, mixture_recipe, tmp_path):
    result = convert(open_source(str(dense())), mixture_recipe(), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"moe", "custom_code", "arxiv:2509.00679"} <= set(card.data.tags)
    assert card.data.license is None
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \| (\d+) \|$", card.text, flags=re.MULTILINE)
    assert rows == [
        (
            str(report.layer),
            f"{report.logit_std:.3g}",
            f"{report.entropy:.3f}",
            f"{min(report.load):.3f}",
            f"{max(report.load):.3f}",
            str(report.dead_experts),
        )
        for report in result.routers
    ]
    plan = result.plan
    assert f"{format_count(plan.total_parameters)} in all, {format_count(plan.active_parameters)} active" in card.text
    assert f"F32, {format_bytes(plan.num_bytes)}" in card.text
    assert "On 512 tokens of `sample.txt`" in card.text
    assert "4 routers of 1 query head, 4 attended keys" in card.text


@pytest.mark.parametrize("router", ["linear", "mixture"])
def test_no_template_mark_is_left(dense, mixture_recipe, linear_recipe, tmp_path, router):
    recipe = linear_recipe() if router == "linear" else mixture_recipe()
    convert(open_source(str(dense("qwen3"))), recipe, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\{[{%]|[%}]\}\s*$|None", text)
    assert "\n\n\n" not in text
    assert text.endswith("\n")
    assert ("What the fresh routers do" in text) == (router == "mixture")


@pytest.mark.parametrize(
    ("parent_card", "expected"),
    [
        ("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Dense\n", {"license": "apache-2.0", "language": ["en"]}),
        (
            "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://example.org/LICENSE\n---\n",
            {"license": "other", "license_name": "qwen-research", "license_link": "https://example.org/LICENSE"},
        ),
        ("# Dense\n\nlicense: none of the front matter\n", {"license": None}),
        ("---\nlicense: [\n---\n", {"license": None}),
    ],
    ids=["apache", "other", "no front matter", "broken"],
)
def test_the_licence_is_the_parents(dense, linear_recipe, tmp_path, parent_card, expected):
    folder = shutil.copytree(dense(), tmp_path / "dense")
    (folder / "README.md").write_text(parent_card, encoding="utf-8")
    convert(open_source(str(folder)), linear_recipe(), tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert {name: data.get(name) for name in expected} == expected


def test_a_parent_on_the_hub_is_linked(dense, linear_recipe):
    local = open_source(str(dense()))
    source = DenseSource("Qwen/Qwen2.5-0.5B", local.folder, "0123abc", local.config, local.tensors)
    card = ModelCard(render_card(planned_checkpoint(build_plan(source, linear_recipe()))))
    assert card.data.base_model == "Qwen/Qwen2.5-0.5B"
    assert "[Qwen/Qwen2.5-0.5B](https://huggingface.co/Qwen/Qwen2.5-0.5B)" in card.text
    assert card.text.startswith("\n# Qwen2.5-0.5B-4x-MoE") or card.text.startswith("# Qwen2.5-0.5B-4x-MoE")


@pytest.mark.parametrize(
    ("settings", "text", "paper"),
    [
        ({}, "**Freshly converted:** it computes what its parent computes.", None),
        (
            {"experts": "noise"},
            "it computes nearly what its parent computes: experts are copies of the FFN with noise of 0.01 standard "
            "deviations (KL from the parent",
            None,
        ),
        (
            {"experts": "drop"},
            "it does not compute what its parent computes: experts are copies of the FFN with 0.5 of its neurons "
            "redrawn. It has to be trained.",
            "2502.19261",
        ),
        ({"experts": "split"}, "**Freshly converted:** it computes what its parent computes.", "2410.07524"),
        (
            {"shared_expert": "plain"},
            "| Shared expert | a copy of the FFN, weight 1, routed and shared outputs halved |",
            "2401.06066",
        ),
        (
            {"shared_expert": "complement"},
            "| Shared expert | a copy of the FFN, weight 1 - highest probability |",
            "2404.15247",
        ),
        (
            {"num_zero_experts": 1, "num_constant_experts": 2},
            "with 4 experts a layer and 3 without computation, at most 2 of them active for each token,",
            "2410.07348",
        ),
        ({"num_copy_experts": 3}, "| Free experts | 3 copy; routers choose among 7 |", "2410.07348"),
        ({"moe_layers": [0, 2]}, "| MoE layers | 2 of 3: 0, 2 |", None),
        (
            {"router_selection": "grouped_top_k", "num_expert_groups": 2},
            "| Selection | softmax, top 1 of each of 2 groups, weights sum to one |",
            "2505.21411",
        ),
        (
            {"router_selection": "prototype_top_k", "num_expert_groups": 2},
            "| Selection | softmax within each of 2 groups, top 1 of each, weights sum to one |",
            "2105.15082",
        ),
        (
            {"router_selection": "top_p", "router_top_p": 0.4},
            ", at most 2 of them active for each token,",
            "2403.07652",
        ),
        (
            {"router_selection": "expert_choice"},
            "experts depend on later tokens: not causal. Evaluation and generation use top_k and are causal.",
            "2202.09368",
        ),
        ({"router_score_function": "sigmoid"}, "| Selection | sigmoid, top 2, weights sum to one |", "2412.19437"),
        ({"use_router_bias": True}, "weights sum to one, balanced by a bias |", "2408.15664"),
        ({"router_jitter_noise": 0.01}, "jitter of 0.01 in training |", "2101.03961"),
    ],
)
def test_the_card_says_what_the_fresh_model_is(dense, linear_recipe, settings, text, paper):
    card = ModelCard(render_card(planned_checkpoint(build_plan(open_source(str(dense())), linear_recipe(**settings)))))
    assert text in card.text
    papers = [tag for tag in card.data.tags if tag.startswith("arxiv:")]
    assert papers == ["arxiv:2212.05055", *([f"arxiv:{paper}"] if paper else [])]


def test_a_model_from_scratch_is_nobodys_child(dense, linear_recipe, tmp_path):
    folder = shutil.copytree(dense(), tmp_path / "dense")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n", encoding="utf-8")
    local = open_source(str(folder))
    source = DenseSource("Qwen/Qwen2.5-0.5B", local.folder, "0123abc", local.config, local.tensors)
    card = ModelCard(
        render_card(planned_checkpoint(build_plan(source, linear_recipe(experts="random", backbone="random"))))
    )
    assert (card.data.base_model, card.data.license, card.data.language) == (None, None, None)
    assert "arxiv:2212.05055" not in card.data.tags
    assert "upcycling" not in card.data.tags
    assert (
        "drawn at random in the shape of the dense model [Qwen/Qwen2.5-0.5B](https://huggingface.co/Qwen/" in card.text
    )
    assert "**Freshly made:** all weights are drawn at random. It has to be trained from the start." in card.text
    for text in ("upcycled from", "upcycling]", "gets wrong", "start equal", "Freshly converted"):
        assert text not in card.text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "Experts start equal and learn to differ only in training."),
        ({"experts": "split"}, "Experts with the same slice start equal and learn to differ only in training."),
        ({"experts": "split", "expert_granularity": 4, "num_experts_per_tok": 4}, None),
        ({"experts": "noise"}, None),
        ({"experts": "drop"}, None),
    ],
)
def test_only_copies_start_equal(dense, linear_recipe, settings, sentence):
    card = render_card(planned_checkpoint(build_plan(open_source(str(dense())), linear_recipe(**settings))))
    assert ("start equal" in card) == (sentence is not None)
    assert sentence is None or f"\n- {sentence}\n" in card
    assert "Whatever its parent gets wrong, this model gets wrong." in card


def test_experts_of_one_parent_each_do_not_start_equal(dense, linear_recipe):
    source, other = open_source(str(dense())), str(dense(seed=1))
    for num_experts in (2, 4):
        card = render_card(
            planned_checkpoint(build_plan(source, linear_recipe(expert_sources=[other], num_experts=num_experts)))
        )
        assert ("Experts from the same parent start equal" in card) == (num_experts == 4)
        assert "Whatever its parents get wrong" in card
        assert "hashes of the dense models" in card


def test_every_paper_belongs_to_a_setting_and_every_router_has_one():
    defaults = ConversionRecipe()
    for setting, value, number in PAPERS:
        assert re.fullmatch(r"\d{4}\.\d{5}", number)
        assert value is GIVEN or value != getattr(defaults, setting) or setting == "router"
    assert {value for setting, value, _ in PAPERS if setting == "router"} == set(ROUTER_INITIALIZERS)


@pytest.mark.parametrize("licences", [("apache-2.0", "apache-2.0"), ("apache-2.0", "other"), ("apache-2.0", None)])
def test_only_a_licence_of_all_parents_is_the_results(dense, linear_recipe, tmp_path, licences):
    folders = []
    for number, licence in enumerate(licences):
        folders.append(shutil.copytree(dense(seed=number), tmp_path / str(number)))
        if licence:
            (folders[-1] / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
    plan = build_plan(open_source(str(folders[0])), linear_recipe(expert_sources=[str(folders[1])]))
    licence = ModelCard(render_card(planned_checkpoint(plan))).data.license
    assert licence == ("apache-2.0" if len(set(licences)) == 1 else None)


def test_the_card_of_a_random_router_names_its_own_method(dense, linear_recipe, tmp_path):
    card = convert(open_source(str(dense())), linear_recipe(), tmp_path / "out").folder / "README.md"
    assert "vanilla upcycling" in card.read_text()
    assert "Router Upcycling" not in card.read_text()
    assert "arxiv:2212.05055" in ModelCard.load(card).data.tags


def test_the_code_in_the_card_runs(dense, linear_recipe, tmp_path, monkeypatch, capsys):
    folder = convert(open_source(str(dense())), linear_recipe(), tmp_path / "out").folder
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")
