import json
import re

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from upcycled_moe.analysis.measures import MEASURES
from upcycled_moe.analysis.report.pictures import PICTURE_FILES
from upcycled_moe.analysis.report.tables import VIEWS
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.model_cards.analysis import PICTURES, read_analysis
from upcycled_moe.model_cards.card import render_card
from upcycled_moe.model_cards.checkpoint import read_checkpoint
from upcycled_moe.model_cards.evaluation import evaluation_results, read_evaluation
from upcycled_moe.model_cards.extras import CardExtras
from upcycled_moe.model_cards.finished import finish_card


def entry(path, accuracy, perplexity):
    return {
        "name": str(path).split("/")[-1],
        "path": str(path),
        "tasks": {
            "copa": {"acc": {"value": accuracy, "stderr": 0.0123456789}},
            "boolq": {"acc": {"value": 0.5, "stderr": None}},
        },
        "averages": {"Average": {"score": {"value": accuracy / 2, "stderr": None}, "tasks": ["copa"], "missing": []}},
        "domains": {
            domain: {"perplexity": perplexity, "bits_per_byte": 1.5, "num_tokens": 4096} for domain in ("math", "code")
        },
    }


@pytest.fixture
def scores(moe, tmp_path):
    """`results.json` on the dense model and ours."""
    tasks = [
        {"name": "copa", "metric": "acc", "num_items": 20, "num_available": 100, "chance": 0.5, "offline": True},
        {"name": "boolq", "metric": "acc", "num_items": 100, "num_available": 100, "chance": None, "offline": False},
    ]
    content = {
        "settings": {"perplexity_data": ["org/text"], "perplexity_datasets": ["org/text"], "split": "validation"},
        "tasks": tasks,
        "checkpoints": [entry(tmp_path / "dense", 0.6, 20.0), entry(moe, 2 / 3, 10.123456789)],
        "notes": ["A quick look."],
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def routing(moe, tmp_path):
    """`report.json` on ours, with two pictures beside it."""
    routing = {
        "per_layer": {"entropy": [1.25, None], "dead_experts": [0, 3]},
        "tables": {"load": [[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]},
    }
    weights = {"per_layer": {"routing_diversity": [0.5, 0.75]}, "tables": {}}
    one = {
        "name": "moe",
        "path": str(moe),
        "layers": [0, 2],
        "measures": {"routing": routing, "routing_weights": weights},
    }
    (tmp_path / "report").mkdir()
    path = tmp_path / "report" / "report.json"
    path.write_text(json.dumps({"checkpoints": [one], "domains": ["math", "code"]}), encoding="utf-8")
    for name in ("overview.png", "load.png", "unknown.png"):
        (path.parent / name).write_bytes(name.encode())
    return path


def test_scores_are_in_the_model_index(moe, scores):
    evaluation = read_evaluation(scores, moe)
    card = ModelCard(render_card(read_checkpoint(moe), CardExtras(title="Ours", evaluations=[evaluation])))
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "Ours"
    assert [(one.dataset_type, one.dataset_config, one.metric_type, one.metric_value) for one in results] == [
        ("aps/super_glue", "copa", "acc", 0.666667),
        ("aps/super_glue", "copa", "acc_stderr", 0.0123457),
        ("aps/super_glue", "boolq", "acc", 0.5),
        ("org/text", "math", "perplexity", 10.1235),
        ("org/text", "math", "bits_per_byte", 1.5),
        ("org/text", "code", "perplexity", 10.1235),
        ("org/text", "code", "bits_per_byte", 1.5),
    ]
    # A part of a set does not pass for the whole.
    assert [one.dataset_name for one in results][1:5] == ["copa (first 20 of 100 items)", "boolq", "math", "math"]


def test_the_model_stands_before_those_it_is_compared_with(moe, scores):
    text = render_card(read_checkpoint(moe), CardExtras(evaluations=[read_evaluation(scores, moe)]))
    for row in (
        "| Task | Metric | Items | Chance | This model | dense |",
        "| copa | acc | 20 | 0.500 | 0.667 ± 0.012 | 0.600 ± 0.012 |",
        "| boolq | acc | 100 | – | 0.500 | 0.500 |",
        "| *Average* | | | | 0.333 | 0.300 |",
        "| math | 10.12 | 20.00 |",
        "- A quick look.",
    ):
        assert f"\n{row}\n" in text


def with_own_entry(scores, **changes):
    content = json.loads(scores.read_text(encoding="utf-8"))
    content["checkpoints"][1].update(changes)
    scores.write_text(json.dumps(content), encoding="utf-8")


def own_facts(moe):
    checkpoint = read_checkpoint(moe)
    return {"model_type": checkpoint.config["model_type"], "num_parameters": checkpoint.weights.total_parameters}


def test_a_folder_that_was_moved_is_found_by_its_name(moe, scores, tmp_path):
    with_own_entry(scores, path=f"/elsewhere/{moe.name}", **own_facts(moe))
    assert read_evaluation(scores, moe).own["path"] == f"/elsewhere/{moe.name}"
    with pytest.raises(SettingsError, match=rf"moe \(/elsewhere/{moe.name}\), but not of one checkpoint x of"):
        read_evaluation(scores, tmp_path / "x")


@pytest.mark.parametrize("difference", ["stands elsewhere", "another type", "another size", "type unknown"])
def test_another_model_of_the_same_name_is_refused(moe, scores, tmp_path, difference):
    facts = own_facts(moe)
    other = tmp_path / "other" / moe.name
    if difference == "stands elsewhere":
        other.mkdir(parents=True)
    elif difference == "another type":
        facts["model_type"] = "qwen2"
    elif difference == "another size":
        facts["num_parameters"] += 1
    else:
        facts = {}
    with_own_entry(scores, path=str(other), **facts)
    with pytest.raises(SettingsError, match="but not of one checkpoint"):
        read_evaluation(scores, moe)


def test_a_report_on_what_was_in_the_folder_before_is_refused(moe, scores):
    with_own_entry(scores, **own_facts(moe) | {"num_parameters": 1})
    with pytest.raises(SettingsError, match="but not of one checkpoint"):
        read_evaluation(scores, moe)


def test_text_that_was_not_recorded_as_of_the_hub_is_nobodys_dataset(moe, scores):
    content = json.loads(scores.read_text(encoding="utf-8"))
    del content["settings"]["perplexity_datasets"]
    scores.write_text(json.dumps(content), encoding="utf-8")
    results = evaluation_results([read_evaluation(scores, moe)])
    assert {one.dataset_type for one in results if one.metric_type == "perplexity"} == {"text"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"checkpoints": 3}, "checkpoints is of type int instead of a list"),
        ({"tasks": [{"name": "copa"}]}, r"tasks\[0\].metric is missing"),
        ({"settings": {"split": 1}}, "settings.split is of type int instead of text"),
        ({"notes": [None]}, r"notes\[0\] is null instead of text"),
    ],
)
def test_a_report_of_another_form_is_refused(moe, scores, change, problem):
    content = json.loads(scores.read_text(encoding="utf-8")) | change
    scores.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SettingsError, match=f"results.json: {problem}; correct it"):
        read_evaluation(scores, moe)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"measures": []}, r"checkpoints\[0\].measures is of type list instead of an object"),
        ({"measures": {"routing": {"per_layer": {}}}}, "routing.per_layer.entropy is missing"),
        ({"layers": [0, 1, 2]}, "moe has not as many figures as layers"),
    ],
)
def test_an_analysis_of_another_form_is_refused(moe, routing, change, problem):
    content = json.loads(routing.read_text(encoding="utf-8"))
    content["checkpoints"][0] |= change
    routing.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SettingsError, match=f"report.json: .*{problem}"):
        read_analysis(routing, moe)


def test_captions_are_those_of_the_report():
    titles = {(measure, table): view.title for (measure, table), view in VIEWS.items()}
    titles |= {(measure.name, figure.name): figure.title for measure in MEASURES for figure in measure.figures}
    assert PICTURES.keys() <= set(PICTURE_FILES)
    for picture in PICTURES.values():
        assert picture.measure is None or picture.shows.startswith(f"{titles[picture.measure, picture.part]}, by ")


def test_captions_name_the_checkpoints_that_are_drawn(moe, routing):
    content = json.loads(routing.read_text(encoding="utf-8"))
    other = content["checkpoints"][0] | {"name": "other", "path": "elsewhere", "measures": {}}
    content["checkpoints"].append(other)
    routing.write_text(json.dumps(content), encoding="utf-8")
    # This one was not compared with its parent.
    (routing.parent / "parent_divergence.png").touch()
    captions = {path.name: shows for path, shows in read_analysis(routing, moe).pictures.items()}
    assert captions == {
        "overview.png": "Routing figures by layer: moe (this model), other",
        "load.png": "Load: share of all selections, by layer and expert: moe (this model)",
    }


def test_a_picture_of_ones_own_stays(moe, routing, tmp_path):
    own = tmp_path / "figures" / "overview.png"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    card = finish_card(moe, CardExtras(analysis=read_analysis(routing, moe)), tmp_path / "card.md")
    with pytest.raises(SettingsError, match=r"overview\.png: is another picture; give --overwrite"):
        card.write()
    assert own.read_bytes() == b"mine"
    assert not (tmp_path / "card.md").exists()
    card.write(overwrite=True)
    assert own.read_bytes() == b"overview.png"
    # Now it is the card's, and follows the report.
    (routing.parent / "overview.png").write_bytes(b"newer")
    card.write()
    assert own.read_bytes() == b"newer"


def test_what_is_in_the_way_is_named(moe, routing, tmp_path):
    with pytest.raises(SettingsError, match="is a folder; give a file with --output, such as"):
        finish_card(moe, CardExtras(), tmp_path).write()
    (tmp_path / "figures").touch()
    card = finish_card(moe, CardExtras(analysis=read_analysis(routing, moe)), tmp_path / "card.md")
    with pytest.raises(SettingsError, match="figures: is a file where the pictures go"):
        card.write()


def test_all_that_the_hub_would_refuse_is_named_with_the_way_out(moe, tmp_path):
    with pytest.raises(
        SettingsError, match=r"license: 'free' .* language: 'English' .* with --license, --language\.$"
    ):
        finish_card(moe, CardExtras(license="free", language=["English"]), tmp_path / "card.md")


def test_one_of_two_of_the_same_name_is_not_guessed(moe, scores):
    content = json.loads(scores.read_text(encoding="utf-8"))
    content["checkpoints"] = [entry(f"/{place}/{moe.name}", 0.5, 1.0) for place in ("here", "there")]
    scores.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SettingsError, match="not of one checkpoint"):
        read_evaluation(scores, moe)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not a JSON file"),
        ("[]", "has no checkpoints, tasks, settings"),
        ('{"checkpoints": []}', "has no tasks, settings"),
        ('{"checkpoints": [{"tasks": {}}], "tasks": [], "settings": {}}', "has no averages, domains"),
    ],
)
def test_another_file_is_refused(moe, tmp_path, content, problem):
    path = tmp_path / "results.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match=f"results.json: {problem}"):
        read_evaluation(path, moe)


def test_routing_is_shown_with_the_pictures_of_the_report(moe, routing, tmp_path):
    card = finish_card(moe, CardExtras(analysis=read_analysis(routing, moe)), tmp_path / "card.md")
    assert "On text of `math`, `code`." in card.text
    assert "\n| 0 | 1.250 | 0.100 | 0.400 | 0.500 | 0 |\n| 2 | – | 0.250 | 0.250 | 0.750 | 3 |\n" in card.text
    assert re.findall(r"!\[.+\]\((.+)\)", card.text) == ["figures/overview.png", "figures/load.png"]
    card.write()
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == {
        "overview.png": b"overview.png",
        "load.png": b"load.png",
    }


def test_a_picture_that_cannot_be_copied_leaves_the_old_card(moe, routing, tmp_path):
    path = tmp_path / "card.md"
    finish_card(moe, CardExtras(), path).write()
    before = path.read_bytes()
    card = finish_card(moe, CardExtras(analysis=read_analysis(routing, moe)), path)
    (routing.parent / "load.png").unlink()
    with pytest.raises(FileNotFoundError):
        card.write()
    assert path.read_bytes() == before


def test_a_card_that_the_hub_would_refuse_is_not_made(moe, tmp_path):
    with pytest.raises(SettingsError, match="the card would not be valid: license: 'free' is not in the Hub's list"):
        finish_card(moe, CardExtras(license="free"), tmp_path / "card.md")
