import re
import shutil

import pytest
from huggingface_hub import ModelCard

from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.numbers import format_bytes, format_count
from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.source import DenseSource, open_source


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
    from upcycled_moe.conversion.card import render_card

    local = open_source(str(dense()))
    source = DenseSource("Qwen/Qwen2.5-0.5B", local.folder, "0123abc", local.config, local.tensors)
    card = ModelCard(render_card(build_plan(source, linear_recipe()), None))
    assert card.data.base_model == "Qwen/Qwen2.5-0.5B"
    assert "[Qwen/Qwen2.5-0.5B](https://huggingface.co/Qwen/Qwen2.5-0.5B)" in card.text
    assert card.text.startswith("\n# Qwen2.5-0.5B-4x-MoE") or card.text.startswith("# Qwen2.5-0.5B-4x-MoE")


@pytest.mark.parametrize(
    ("settings", "text", "paper"),
    [
        ({}, "**Freshly converted:** it computes what its parent computes.", None),
        (
            {"experts": "noise"},
            "it computes nearly what its parent computes: experts are copies of the FFN with noise of 0.01 standard deviations.",
            None,
        ),
        (
            {"experts": "drop"},
            "it does not compute what its parent computes: experts are copies of the FFN with 0.5 of its neurons redrawn. It has to be",
            "2502.19261",
        ),
        ({"experts": "split"}, "**Freshly converted:** it computes what its parent computes.", "2410.07524"),
        ({"shared_expert": "plain"}, "initialised by `copy`; a shared one beside them (`plain`) |", None),
    ],
)
def test_the_card_says_what_the_fresh_model_is(dense, linear_recipe, settings, text, paper):
    from upcycled_moe.conversion.card import render_card

    card = ModelCard(render_card(build_plan(open_source(str(dense())), linear_recipe(**settings)), None))
    assert text in card.text
    papers = [tag for tag in card.data.tags if tag.startswith("arxiv:")]
    assert papers == ["arxiv:2212.05055", *([f"arxiv:{paper}"] if paper else [])]


@pytest.mark.parametrize("licences", [("apache-2.0", "apache-2.0"), ("apache-2.0", "other"), ("apache-2.0", None)])
def test_only_a_licence_of_all_parents_is_the_results(dense, linear_recipe, tmp_path, licences):
    from upcycled_moe.conversion.card import render_card

    folders = []
    for number, licence in enumerate(licences):
        folders.append(shutil.copytree(dense(seed=number), tmp_path / str(number)))
        if licence:
            (folders[-1] / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
    plan = build_plan(open_source(str(folders[0])), linear_recipe(expert_sources=[str(folders[1])]))
    licence = ModelCard(render_card(plan, None)).data.license
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
