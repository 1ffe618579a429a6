import json
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from upcycled_moe.common.provenance import PROVENANCE_FILE, read_provenance
from upcycled_moe.train.saving.card import CardCallback


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
    callback = CardCallback(str(output_dir), SOURCE, tokens_per_step=100)
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


def test_a_model_that_was_not_converted_has_a_card_and_no_provenance(run):
    output_dir, _ = run
    (output_dir / "trainer_state.json").write_text(json.dumps(vars(STATE)), encoding="utf-8")
    CardCallback(str(output_dir), SOURCE, tokens_per_step=100).on_model(None, STATE, output_dir)
    assert not (output_dir / PROVENANCE_FILE).exists()
    assert "A dense language model." in (output_dir / "README.md").read_text(encoding="utf-8")


def test_a_card_of_a_person_stays(run):
    output_dir, _ = run
    (output_dir / "README.md").write_text("# Mine\n", encoding="utf-8")
    CardCallback(str(output_dir), SOURCE, tokens_per_step=100).on_model(None, STATE, output_dir)
    assert (output_dir / "README.md").read_text(encoding="utf-8") == "# Mine\n"


def test_no_model_is_lost_for_a_card(run, capsys):
    output_dir, _ = run
    (output_dir / "config.json").unlink()
    CardCallback(str(output_dir), SOURCE, tokens_per_step=100).on_model(None, STATE, output_dir)
    assert "train.py: warning: run: no card is written (" in capsys.readouterr().err
