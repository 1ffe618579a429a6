import json
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from training_runs import command_line

from upcycled_moe.common.provenance import PROVENANCE_FILE, read_provenance
from upcycled_moe.conversion.card import planned_checkpoint
from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source
from upcycled_moe.model_cards.card import render_card
from upcycled_moe.train.saving.card import CardCallback
from upcycled_moe.train.train import main


STATE = SimpleNamespace(global_step=20, log_history=[{"step": 20, "loss": 2.5}, {"step": 20, "eval_loss": 2.25}])
SOURCE = {"name": "Qwen/Qwen2.5-0.5B", "revision": "main"}
CONFIG = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2}


@pytest.fixture
def run(tmp_path):
    """Folder of a run, and one with the configuration of the checkpoint that is being made."""
    folders = tmp_path / "run", tmp_path / "run" / "checkpoint-20"
    folders[1].mkdir(parents=True)
    for folder in folders:
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folders[0] / "LICENSE").write_text("terms", encoding="utf-8")
    return folders


def test_each_save_tells_of_the_run_once(run):
    output_dir, checkpoint = run
    origin = {"steps": [{"command": "prune"}]}
    (output_dir / PROVENANCE_FILE).write_text(json.dumps(origin), encoding="utf-8")
    callback = CardCallback(str(output_dir), SOURCE, output_dir, tokens_per_step=100)
    callback.on_checkpoint(None, STATE, checkpoint)
    # A model may be saved more than once.
    for _ in range(2):
        callback.on_model(None, STATE, output_dir)
    for folder in run:
        pruned, trained = read_provenance(folder)["steps"]
        assert pruned == origin["steps"][0]
        assert (trained["command"], trained["steps"], trained["tokens"], trained["loss"]) == ("train", 20, 2000, 2.5)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "**train** for 20 steps, 2,000 tokens; validation loss 2.2500 at the end." in card
        data = ModelCard(card).data
        assert (data.base_model, data.base_model_relation) == ("Qwen/Qwen2.5-0.5B", "finetune")
        assert data.license is None
    assert (checkpoint / "LICENSE").read_text(encoding="utf-8") == "terms"


def test_a_dense_model_keeps_its_origin_through_training_and_conversion(settings, dense_checkpoint, tmp_path):
    start, out = shutil.copytree(dense_checkpoint, tmp_path / "start"), tmp_path / "out"
    terms = {"license": "apache-2.0", "language": ["en"]}
    (start / "README.md").write_text(
        f"---\n{json.dumps(terms | {'base_model': 'org/dense'})}\n---\n", encoding="utf-8"
    )
    command = {**settings, "model_name_or_path": start, "output_dir": out, "max_steps": 2}
    # A run that begins again does not count the one before.
    for _ in range(2):
        assert main(command_line(command)) == 0
    provenance = read_provenance(out)
    assert list(provenance) == ["steps"]
    (trained,) = provenance["steps"]
    assert (trained["steps"], trained["tokens"], trained["datasets"]) == (2, 256, [])
    card = ModelCard.load(out / "README.md")
    assert {name: card.data.get(name) for name in terms} == terms
    assert (card.data.base_model, card.data.base_model_relation) == ("org/dense", "finetune")
    assert "A dense language model, trained from `start`." in card.text
    assert "1. **train** for 2 steps, 256 tokens, on `" in card.text
    assert "## Licence\n\n`apache-2.0`, as `start`." in card.text

    plan = build_plan(open_source(str(out)), ConversionRecipe(router="linear", num_experts=4))
    converted = ModelCard(render_card(planned_checkpoint(plan))).data
    assert {name: converted.get(name) for name in terms} == terms
    assert converted.base_model == "org/dense"


def test_an_older_evaluation_is_not_called_that_of_the_end(run):
    output_dir, checkpoint = run
    state = SimpleNamespace(global_step=30, log_history=STATE.log_history)
    CardCallback(str(output_dir), SOURCE, output_dir, tokens_per_step=100).on_checkpoint(None, state, checkpoint)
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert "validation loss 2.2500 at step 20." in card
    assert "Validation, at step 20." in card


def test_a_card_of_a_person_stays(run):
    output_dir, _ = run
    (output_dir / "README.md").write_text("# Mine\n", encoding="utf-8")
    CardCallback(str(output_dir), SOURCE, output_dir, tokens_per_step=100).on_model(None, STATE, output_dir)
    assert (output_dir / "README.md").read_text(encoding="utf-8") == "# Mine\n"


def test_no_model_is_lost_for_a_card(run, capsys):
    output_dir, _ = run
    (output_dir / "config.json").unlink()
    CardCallback(str(output_dir), SOURCE, output_dir, tokens_per_step=100).on_model(None, STATE, output_dir)
    assert "train.py: warning: run: no card is written (" in capsys.readouterr().err
