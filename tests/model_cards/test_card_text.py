import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from upcycled_moe.common.provenance import read_provenance, write_provenance
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.conversion.card import planned_checkpoint
from upcycled_moe.conversion.papers import PAPERS
from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source
from upcycled_moe.merging.settings import METHODS
from upcycled_moe.model_cards.card import declared_in, is_replaceable, render_card, update_card, write_card
from upcycled_moe.model_cards.checkpoint import read_checkpoint
from upcycled_moe.model_cards.extras import CardExtras
from upcycled_moe.model_cards.papers import STEP_PAPERS, TITLES, papers_of
from upcycled_moe.model_cards.validation import card_problems


HUB_PARENT = {"name": "Qwen/Qwen2.5-0.5B", "revision": "0123abc"}
TRAIN = {
    "command": "train",
    "source": {"name": "/home/me/moe", "revision": None},
    "steps": 1000,
    "tokens": 4096000,
    "data": ["HuggingFaceFW/fineweb:sample-10BT", "wiki.parquet"],
    "datasets": ["HuggingFaceFW/fineweb"],
    "settings": {"learning_rate": 3e-4, "block_size": 4096},
    "loss": 2.51234,
    "evaluation": {"math": 2.0, "wiki": 2.5, "all": 2.25},
    "evaluation_step": 1000,
    "routers": [
        {"layer": 0, "entropy": 1.23456, "max_violation": 0.5, "dead_experts": 0},
        {"layer": 2, "entropy": None, "max_violation": None, "dead_experts": None},
    ],
}
PRUNE = {
    "command": "prune",
    "source": {"name": "run", "revision": None},
    "method": "reap",
    "num_experts": {"before": 4, "after": 2},
    "num_experts_per_tok": {"before": 2, "after": 1},
    "loss": {"before": {"mean": 2.0}, "after": {"mean": 2.1}},
}
EXPORT = {
    "command": "export",
    "source": {"name": "run", "revision": None},
    "architecture": "Qwen2MoeForCausalLM",
    "reason": "the first that computes the same",
    "notes": ["routers run in bfloat16."],
}
MERGE = {"command": "merge", "source": {"name": "run", "revision": None}, "method": "usage"}
NATIVE = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 0}
DENSE = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_experts": None}
# Steps and the configuration after them, of each kind of checkpoint.
KINDS = {
    "fresh": ((), {}),
    "trained": ((TRAIN,), {}),
    "pruned": ((TRAIN, PRUNE), {"num_experts": 2, "num_experts_per_tok": 1}),
    "exported": ((TRAIN, EXPORT), NATIVE),
    "merged": ((TRAIN, MERGE), DENSE),
    "another version": (({"command": "prune", "method": "reap", "num_experts": 3},), {}),
    "something new": (({"command": "distill", "temperature": 2.5, "layers": [1, 2], "versions": {}},), {}),
}


def card_of(checkpoint, **extras):
    return ModelCard(render_card(checkpoint, CardExtras(**extras)))


def test_a_written_card_is_the_planned_one(conversion, moe):
    assert (moe / "README.md").read_text(encoding="utf-8") == render_card(planned_checkpoint(conversion.plan))


@pytest.mark.parametrize("kind", KINDS)
def test_no_card_has_gaps(after_steps, kind):
    steps, config = KINDS[kind]
    text = render_card(after_steps(*steps, **config))
    assert not re.search(r"\{[{%]|[%}]\}|None|nan|\n\n\n| \n|\.\.", text.replace('".', ""))
    assert not re.search(r"^#+ .*\n+(#|<!--)", text, flags=re.MULTILINE), "a heading with nothing below it"
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("kind", "sentences"),
    {
        "trained": [
            "1. **convert** from `",
            "2. **train** for 1,000 steps, 4,096,000 tokens, on `HuggingFaceFW/fineweb:sample-10BT`, `wiki.parquet`; "
            "validation loss 2.2500 at the end.",
            "| `learning_rate` | 0.0003 |",
            "| Last training loss | 2.5123 |",
            "| wiki | 2.5000 | 12.18 |\n| all | 2.2500 | 9.49 |",
            "| 0 | 1.235 | 1.50 | 0 |\n| 2 | – | – | – |",
            "Whatever its parent gets wrong, this model may get wrong too.",
            "| Experts | 4 a layer, 2 active: copies of the FFN |",
        ],
        "pruned": [
            "with 2 experts a layer, 1 of them active for each token,",
            "3. **prune** 4 experts a layer to 2, by `reap`, with 1 active instead of 2; "
            "perplexity 7.39 before, 8.17 after.",
            "| Experts | 2 a layer, 1 active |",
            "Which experts went was decided on a sample of text",
            "https://huggingface.co/papers/2510.13999",
        ],
        "exported": [
            "3. **export** to Qwen2MoeForCausalLM, a class of Transformers' own: the first that computes the same.",
            'from_pretrained(path, dtype="auto")',
            "vllm serve .",
            "\n- On the export: routers run in bfloat16.\n",
        ],
        "merged": [
            "A dense language model, made by merging the experts of a Mixture-of-Experts model that was\n"
            "upcycled from the dense model",
            "3. **merge** back to a dense model, by `usage`: each FFN is a mean of the experts of its layer, weighted "
            "by what the routers give them on text.",
            "A merged FFN is an approximation of the experts, unless these were equal.",
        ],
        "another version": ["2. **prune** method reap, num_experts 3."],
        "something new": ["2. **distill** temperature 2.5."],
    }.items(),
)  # fmt: skip
def test_a_card_tells_what_was_done(after_steps, kind, sentences):
    steps, config = KINDS[kind]
    text = render_card(after_steps(*steps, **config))
    for sentence in sentences:
        assert sentence in text
    assert "Freshly converted" not in text


@pytest.mark.parametrize(
    ("facts", "command"),
    [
        ({}, "\nvllm serve .  #"),
        ({"vllm_model_impl": "vllm"}, "\nvllm serve .  #"),
        ({"vllm_model_impl": "transformers"}, "\nvllm serve . --model-impl transformers  #"),
        ({"vllm_model_impl": None}, None),
    ],
)
def test_the_card_of_an_export_has_it_served_by_what_computes_the_same(facts, command, after_steps):
    text = render_card(after_steps(TRAIN, {**EXPORT, **facts}, **NATIVE))
    assert (command in text) if command else ("vllm serve" not in text)


def test_figures_of_a_training_are_not_those_of_what_is_made_of_it(after_steps):
    assert "## Training" in render_card(after_steps(TRAIN))
    assert "## Training" not in render_card(after_steps(TRAIN, PRUNE, num_experts=2))


@pytest.mark.parametrize("kind", KINDS)
def test_only_our_own_model_asks_for_trust(after_steps, kind):
    steps, config = KINDS[kind]
    card = card_of(after_steps(*steps, **config))
    is_ours = kind not in ("exported", "merged")
    assert ("trust_remote_code" in card.text) == ("custom_code" in card.data.tags) == is_ours
    assert ("moe" in card.data.tags) == (kind != "merged")


@pytest.mark.parametrize(
    ("steps", "base_model", "relation"),
    [
        ((), HUB_PARENT["name"], None),
        ((EXPORT,), HUB_PARENT["name"], None),
        ((TRAIN,), HUB_PARENT["name"], "finetune"),
        (
            (
                TRAIN | {"source": {"name": "org/fresh", "revision": "abc"}},
                PRUNE | {"source": {"name": "org/trained", "revision": "def"}},
                EXPORT,
            ),
            "org/trained",
            "finetune",
        ),
    ],
)
def test_the_base_model_is_the_nearest_one_on_the_hub(after_steps, steps, base_model, relation):
    data = card_of(after_steps(*steps, source=HUB_PARENT)).data
    assert (data.base_model, data.get("base_model_relation")) == (base_model, relation)


def test_a_model_of_several_is_a_merge(after_steps):
    checkpoint = after_steps(source=HUB_PARENT)
    both = {
        **checkpoint.provenance,
        "expert_sources": [{"name": "org/other", "revision": "4567"}],
        "description": {
            **checkpoint.description,
            "terms": [{"license": "mit", "language": ["de"]}, {"license": "mit"}],
        },
    }
    data = card_of(dataclasses.replace(checkpoint, provenance=both)).data
    assert (data.base_model, data.base_model_relation) == ([HUB_PARENT["name"], "org/other"], "merge")
    assert (data.license, data.language) == ("mit", None)


def test_a_local_parent_is_no_base_model(after_steps):
    card = card_of(after_steps(TRAIN))
    assert card.data.base_model is None
    assert "/home/me" not in card.text


def test_only_datasets_of_the_hub_are_in_the_metadata(after_steps):
    assert card_of(after_steps(TRAIN)).data.datasets == ["HuggingFaceFW/fineweb"]
    assert card_of(after_steps(TRAIN), datasets=["org/set"]).data.datasets == ["org/set"]
    assert card_of(after_steps()).data.datasets is None


def test_a_licence_that_is_given_leaves_nothing_of_the_parents(after_steps):
    checkpoint = after_steps()
    terms = {"license": "other", "license_name": "research", "license_link": "https://example.org", "language": ["en"]}
    description = {**checkpoint.description, "terms": [terms]}
    checkpoint = dataclasses.replace(checkpoint, provenance={**checkpoint.provenance, "description": description})
    inherited = card_of(checkpoint)
    assert {name: inherited.data.get(name) for name in terms} == terms
    assert "[`research`](https://example.org), as `" in inherited.text
    given = card_of(checkpoint, license="mit")
    assert {name: given.data.get(name) for name in terms} == {
        **dict.fromkeys(terms),
        "license": "mit",
        "language": ["en"],
    }
    assert "## Licence\n\n`mit`.\n" in given.text


def with_terms(checkpoint, *terms, **provenance):
    """`checkpoint` as if the cards of its dense models had declared `terms`."""
    description = {**checkpoint.description, "terms": list(terms)}
    return dataclasses.replace(
        checkpoint, provenance={**checkpoint.provenance, "description": description, **provenance}
    )


def test_a_licence_its_name_and_its_link_are_one(after_steps):
    one = {"license": "other", "license_name": "research", "license_link": "https://example.org/a"}
    for other in (one | {"license_name": "community"}, one | {"license_link": "https://example.org/b"}, {}):
        both = with_terms(after_steps(), one, other, expert_sources=[{"name": "org/other", "revision": "4567"}])
        data = card_of(both).data
        assert not {"license", "license_name", "license_link"} & data.to_dict().keys()


@pytest.mark.parametrize("licence", ["Apache 2.0", "other", ["mit", "Apache 2.0"], 3])
def test_terms_that_the_hub_does_not_know_are_told_in_the_text(after_steps, licence):
    text = render_card(with_terms(after_steps(), {"license": licence, "language": "English"}))
    card = ModelCard(text)
    assert (card.data.license, card.data.language) == (None, None)
    assert card_problems(text) == []
    shown = ", ".join(f"`{name}`" for name in (licence if isinstance(licence, list) else [licence]))
    assert f"its card calls the licence {shown}, which the Hub does not know so." in card.text
    assert "was for `English`, as its card has it" in card.text


def test_a_list_of_licences_reads_as_one(after_steps):
    card = card_of(with_terms(after_steps(), {"license": ["mit", "apache-2.0"]}))
    assert card.data.license == ["mit", "apache-2.0"]
    assert "## Licence\n\n`mit`, `apache-2.0`, as `" in card.text


def test_the_base_model_of_a_local_parent_is_the_nearest_on_the_hub(after_steps):
    assert card_of(with_terms(after_steps(), {"base_model": ["org/base"]})).data.base_model == "org/base"
    assert card_of(with_terms(after_steps(), {"base_model": ["./base", 3]})).data.base_model is None


def test_a_recorded_name_is_not_resolved_again(after_steps, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").symlink_to("elsewhere")
    monkeypatch.chdir(tmp_path)
    assert "dense model `model`\n" in render_card(after_steps(source={"name": "./model/", "revision": None}))


def test_a_conversion_of_the_folder_that_one_is_in_records_its_name(dense, monkeypatch):
    folder = dense()
    monkeypatch.chdir(folder)
    plan = build_plan(open_source("."), ConversionRecipe(router="linear", num_experts=4))
    checkpoint = planned_checkpoint(plan)
    monkeypatch.chdir("/")
    assert checkpoint.parents[0].name == folder.name


@pytest.mark.parametrize(
    ("steps", "config", "state"),
    [
        (
            (EXPORT,),
            NATIVE,
            "**Not trained** since the conversion, after which it computed what its parent computes. ",
        ),
        ((PRUNE, TRAIN), {}, None),
        ((TRAIN, PRUNE), {}, None),
    ],
)
def test_what_was_not_trained_says_so_until_it_is(after_steps, steps, config, state):
    text = render_card(after_steps(*steps, **config))
    assert ("Not trained" in text) == (state is not None)
    assert state is None or f"\n{state}Its worth comes with training.\n" in text
    fresh = after_steps(*steps, **config)
    description = {**fresh.description, "preserves_function": "no", "preservation_reason": "neurons are redrawn"}
    redrawn = dataclasses.replace(fresh, provenance={**fresh.provenance, "description": description})
    told = "it did not compute what its parent computes: neurons are redrawn. It has to be trained."
    assert (told in render_card(redrawn)) == (state is not None)


@pytest.mark.parametrize(
    ("dtypes", "rounding"), [(("F32",), ""), (("BF16", "F32"), ", up to rounding in bfloat16"), (("F16",), "float16")]
)
def test_what_is_rounded_is_not_called_the_same(after_steps, dtypes, rounding):
    checkpoint = after_steps()
    checkpoint = dataclasses.replace(checkpoint, weights=dataclasses.replace(checkpoint.weights, dtypes=dtypes))
    text = render_card(checkpoint)
    assert f"{rounding}. Its worth comes with training." in text
    assert ("up to rounding" in text) == bool(rounding)


@pytest.mark.parametrize("method", METHODS)
def test_each_way_to_merge_has_its_sentence(after_steps, method):
    text = render_card(after_steps(TRAIN, MERGE | {"method": method}, **DENSE))
    assert f"3. **merge** back to a dense model, by `{method}`: each FFN is " in text
    assert ("what the routed experts had learned was left out" in text) == (method == "shared")
    assert ("A merged FFN is an approximation" in text) == (method != "shared")


def test_what_was_declared_holds_in_later_cards(copied, tmp_path):
    path = copied / "README.md"
    extras = CardExtras(title="Ours", license="other", license_name="a --> b", language=["en"], datasets=["org/set"])
    path.write_text(render_card(read_checkpoint(copied), extras), encoding="utf-8")
    declared = path.read_text(encoding="utf-8")
    (comment,) = re.findall(r"<!-- declared .*?-->", declared)
    assert comment.endswith('["org/set"]} -->'), "no value ends the comment"
    assert update_card(copied)
    assert path.read_text(encoding="utf-8") == declared
    # The title is this model's alone.
    derived = shutil.copytree(copied, tmp_path / "derived")
    write_card(derived, source=copied)
    card = ModelCard.load(derived / "README.md")
    assert (card.data.license_name, card.data.language, card.data.datasets) == ("a --> b", ["en"], ["org/set"])
    assert "# Ours" not in card.text
    # Another licence leaves nothing of the earlier one.
    licence = CardExtras(license="mit").with_earlier(declared_in(path))
    assert (licence.license, licence.license_name, licence.language) == ("mit", None, ["en"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": [TRAIN | {"steps": "100"}]}, "steps is of type str instead of a whole number"),
        ({"steps": [TRAIN | {"routers": [{"entropy": 1.0}]}]}, r"routers\[0\].layer is missing"),
        ({"steps": [{"command": 3}]}, r"steps\[0\].command is of type int instead of text"),
        ({"steps": [{"command": "prune", "source": "run"}]}, r"steps\[0\].source is of type str instead of an object"),
        ({"description": {}}, "description.lines is missing"),
        ({"expert_sources": [HUB_PARENT]}, "description.terms are of 1 dense models instead of 2"),
    ],
)
def test_provenance_of_another_form_is_refused(copied, change, problem):
    write_provenance(copied, read_provenance(copied) | change)
    with pytest.raises(SettingsError, match=rf"upcycling.json: {problem}; correct it"):
        read_checkpoint(copied)


def test_a_run_that_kept_no_provenance_and_may_be_of_its_best_step_is_not_told_of(copied):
    state = {"global_step": 10, "best_global_step": 5, "log_history": [{"step": 10, "loss": 3.0}]}
    (copied / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    assert read_checkpoint(copied).steps == []


def test_an_unknown_licence_is_not_made_up(moe):
    card = ModelCard.load(moe / "README.md")
    assert card.data.license is None
    assert re.search(r"## Licence\n\nThe terms of `\S+` apply; which these are, its card did not say\.", card.text)


def test_terms_of_a_dense_model_that_was_trained_are_those_of_its_start(after_steps):
    step = TRAIN | {"source": {"name": "org/dense", "revision": "main"}}
    checkpoint = dataclasses.replace(after_steps(**DENSE), provenance={"steps": [step]})
    card = card_of(checkpoint)
    linked = "[org/dense](https://huggingface.co/org/dense)"
    assert f"## Licence\n\nThe terms of {linked} apply; which these are, its card did not say.\n" in card.text
    assert (card.data.base_model, card.data.license) == ("org/dense", None)


def test_of_a_model_from_scratch_only_what_came_later_is_a_base(after_steps):
    checkpoint = after_steps(TRAIN, source=HUB_PARENT)
    recipe = {**checkpoint.recipe, "experts": "random", "backbone": "random"}
    checkpoint = dataclasses.replace(checkpoint, provenance={**checkpoint.provenance, "recipe": recipe})
    assert card_of(checkpoint).data.base_model is None
    step = TRAIN | {"source": {"name": "org/moe", "revision": "main"}}
    checkpoint = dataclasses.replace(checkpoint, provenance={**checkpoint.provenance, "steps": [step]})
    assert card_of(checkpoint).data.base_model == "org/moe"


def test_a_classifier_is_loaded_as_one(after_steps):
    card = card_of(after_steps(architectures=["UpcycledQwenMoeForSequenceClassification"]))
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained(path, trust" in card.text
    assert "print(model(**inputs).logits)" in card.text
    assert "generate" not in card.text


@pytest.mark.parametrize(
    ("step", "number"),
    [
        ({"command": "merge", "method": "learned"}, "2404.15247"),
        ({"command": "merge", "method": "learned", "other_sources": [{"name": "other"}]}, None),
        ({"command": "merge", "method": "average"}, None),
        ({"command": "iterative_dpo", "reference": "learned"}, "2605.23398"),
        ({"command": "iterative_dpo", "reference": "last"}, None),
    ],
)
def test_a_step_is_cited_by_what_it_did(step, number):
    numbers = papers_of(SimpleNamespace(description={}, steps=[step]))
    assert numbers == ([] if number is None else [number])


def test_every_paper_has_a_title():
    assert {number for _, _, number in PAPERS} | set(STEP_PAPERS.values()) <= set(TITLES)


@pytest.fixture
def copied(moe, tmp_path):
    return shutil.copytree(moe, tmp_path / "copied")


def test_an_edited_card_stays(copied):
    path = copied / "README.md"
    made = path.read_text(encoding="utf-8")
    assert is_replaceable(path)
    for edited in (made.replace("# Limits", "# My limits"), made + "More.\n", "# Mine\n", made.replace("\n", "\r\n")):
        path.write_bytes(edited.encode())
        assert not update_card(copied)
        assert path.read_bytes() == edited.encode()
    path.unlink()
    assert update_card(copied)
    assert path.read_text(encoding="utf-8") == made


def test_a_card_is_replaced_by_what_is_true_now(copied):
    write_provenance(copied, read_provenance(copied) | {"steps": [TRAIN]})
    assert update_card(copied)
    assert "2. **train** for 1,000 steps" in (copied / "README.md").read_text(encoding="utf-8")


def test_weights_that_cannot_be_read_have_no_size(copied):
    (copied / "model.safetensors").unlink()
    write_card(copied)
    text = (copied / "README.md").read_text(encoding="utf-8")
    assert "| Experts | 4 a layer, 2 active: copies of the FFN |" in text
    assert "| Parameters |" not in text
    assert "| Weights |" not in text


def test_a_training_that_kept_no_provenance_is_told_of(copied):
    log = [
        {"step": 5, "loss": 3.5, "lm_loss": 3.4, "router/layer_00/entropy": 1.0, "router/layer_00/dead_experts": 3},
        {"step": 5, "eval_math_loss": 3.0},
        {"step": 10, "loss": 3.1, "lm_loss": 3.0, "router/layer_100/entropy": 1.0, "router/layer_99/entropy": 1.1},
        {"step": 10, "eval_math_loss": 2.0, "eval_math_runtime": 1.0},
        {"step": 10, "eval_loss": 2.0},
        {"step": 10, "train_loss": 3.2},
    ]
    state = {"global_step": 10, "log_history": log}
    (copied / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    settings = "train_data:\n- some/folder/text.parquet\nlearning_rate: 1e-4\n"
    (copied / "training_config.yaml").write_text(settings, encoding="utf-8")
    (step,) = read_checkpoint(copied).steps
    assert (step["loss"], step["evaluation"]) == (3.0, {"math": 2.0, "all": 2.0})
    assert [layer["layer"] for layer in step["routers"]] == [99, 100]
    write_card(copied)
    text = (copied / "README.md").read_text(encoding="utf-8")
    assert "**train** for 10 steps, on `text.parquet`; validation loss 2.0000 at the end." in text
    # One domain is all there is.
    assert "| math | 2.0000 | 7.39 |" in text
    assert "| all |" not in text
