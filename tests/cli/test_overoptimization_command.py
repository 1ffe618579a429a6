import json

import numpy as np
import pytest

from upcycled_moe.overoptimization import overoptimize, scoring


PROMPTS, RESPONSES = 60, 16


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Responses that say how good they are, and whether they have a flaw, which costs gold three."""
    generator = np.random.default_rng(0)
    flaws = generator.random((PROMPTS, RESPONSES)) < 0.08
    worth = generator.normal(size=(PROMPTS, RESPONSES)) - 3 * flaws
    rows = [
        {
            "prompt": f"ask {number}",
            "responses": [f"{value} {int(flaw)}" for value, flaw in zip(*row, strict=True)],
            "human": row[0].tolist(),
        }
        for number, row in enumerate(zip(worth, flaws, strict=True))
    ]
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Folders of reward models that love a flaw as much as their name says."""

    def score(model, tokenizer, conversations, **_):
        read = [map(float, conversation[-1]["content"].split()) for conversation in conversations]
        return [worth + float(model) * flaw for worth, flaw in read]

    monkeypatch.setattr(scoring, "load_reward_model", lambda path, **_: (path.rpartition("/")[2], None))
    monkeypatch.setattr(scoring, "score_conversations", score)
    monkeypatch.setattr(scoring, "free_memory", lambda: None)
    monkeypatch.setattr(overoptimize, "write_plot", lambda results, path: path.touch())
    for name in ("0", "1", "8", "9"):
        (tmp_path / name).mkdir()
        config = {"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1}
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "name": name}))
        (tmp_path / name / "model.safetensors").write_text(name)
    return tmp_path


def run(upcycled_moe, table, models, *options, gold=("--gold-column", "human"), names=("dense=8,9", "moe=1")):
    named = [
        f"{name}={','.join(str(models / seed) for seed in seeds.split(','))}"
        for name, _, seeds in (given.partition("=") for given in names)
    ]
    return upcycled_moe(
        *("overoptimization", "--samples", table, *gold, "--reward-models", *named),
        *("--output", models / "out", "--num-resamples", 200, *options),
    )


def test_the_table_and_what_follows(upcycled_moe, table, models):
    status, out, _ = run(upcycled_moe, table, models, "--ensemble", "worst=min:dense,moe")
    assert status == 0
    lines = out.splitlines()
    assert lines[1].split()[:5] == ["Model", "Seeds", "Peak", "of", "gold"]
    rows = {line.split()[0]: line.split() for line in lines[2:5]}
    assert {name: row[1] for name, row in rows.items()} == {"dense": "2", "moe": "1", "worst": "1"}
    results = json.loads((models / "out" / "results.json").read_text())
    figures = results["models"]["dense"]["figures"]
    assert rows["dense"][2:4] == [f"{figures['gold_at_peak']:+.3f}", str(figures["peak"])]
    drops = [f"{seed['figures']['drop']:.3f}" for seed in results["models"]["dense"]["seeds"]]
    assert rows["dense"][-3:] == [f"{figures['pairwise_accuracy']:.1%}", *drops]
    assert lines[5].startswith("60 prompts, 16 responses to each.")
    assert lines[6].startswith("dense, the baseline, over-optimises: gold falls by ")
    assert lines[7].startswith("moe loses less than dense, on these seeds: ")
    assert lines[-1] == f"Wrote {models / 'out'}; the numbers are in {models / 'out' / 'results.json'}."


def test_json_is_what_is_written(upcycled_moe, table, models):
    status, out, err = run(upcycled_moe, table, models, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == json.loads((models / "out" / "results.json").read_text())


def test_it_says_when_the_baseline_holds(upcycled_moe, table, models):
    status, out, _ = run(upcycled_moe, table, models, "--baseline", "moe")
    assert status == 0
    assert "moe, the baseline, does not over-optimise here: " in out
    assert "There is nothing that another model could reduce" in out


def test_gold_may_be_a_model(upcycled_moe, table, models):
    _, by_column, _ = run(upcycled_moe, table, models, "--json")
    status, by_model, _ = run(upcycled_moe, table, models, "--json", "--overwrite", gold=("--gold", str(models / "0")))
    assert status == 0
    assert json.loads(by_model)["models"] == json.loads(by_column)["models"]


def test_the_second_run_needs_leave_and_scores_nothing(upcycled_moe, table, models):
    _, first, _ = run(upcycled_moe, table, models)
    status, _, err = run(upcycled_moe, table, models)
    assert (status, err.count("\n")) == (2, 1)
    assert "--overwrite" in err
    status, again, err = run(upcycled_moe, table, models, "--overwrite")
    assert (status, again) == (0, first)
    assert err.count("its scores are there already.") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "org/lm"], "Give samples once: --samples with a table, or --policy with --prompts."),
        (["--temperature", "0.5"], "--temperature has no meaning with --samples; leave it out."),
        (["--prompts", "x.parquet"], "--prompts has no meaning with --samples; leave it out."),
        (["--num-samples", "64"], "--num-samples has no meaning with --samples; leave it out."),
        (["--seed", "-1"], "seed=-1 must be at least 0."),
        (["--gold", "org/gold"], "Give gold once"),
        (["--ensemble", "worst"], "'worst': give an ensemble as NAME=METHOD:MODEL,MODEL"),
        (["--ensemble", "worst=min:moe"], "Ensemble worst: has one member only"),
        (["--baseline", "mo"], "baseline='mo' is no model; there are dense, moe."),
        (["--num-resamples", "1"], "num_resamples=1 must be at least 100."),
        (["--gold-column", "people"], "gold_column='people'"),
        (["--reward-models", "dense=./nowhere"], "./nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line(upcycled_moe, table, models, options, message):
    status, out, err = run(upcycled_moe, table, models, *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (models / "out").exists()


def test_samples_are_needed(upcycled_moe, models):
    status, _, err = upcycled_moe(
        *("overoptimization", "--gold", "org/gold", "--reward-models", "org/rm", "--output", models / "out")
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "Give samples once" in err


def test_an_interruption_keeps_what_is_scored(upcycled_moe, table, models, monkeypatch):
    score = scoring.score_conversations

    def interrupted(model, *arguments, **options):
        if model == "9":
            raise KeyboardInterrupt
        return score(model, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_conversations", interrupted)
        status, out, err = run(upcycled_moe, table, models)
    assert (status, out, err) == (130, "", "upcycled-moe: error: interrupted.\n")
    status, out, err = run(upcycled_moe, table, models)
    assert status == 0
    assert err == f"{models / '8'}: its scores are there already.\n"
