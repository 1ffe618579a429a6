"""The study's modules, and a study small enough for a test."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml


STUDY = Path(__file__).parents[2] / "studies" / "router_upcycling"
TEXT = Path(__file__).parents[2] / "demo" / "text"
# The script's folder, as when it is run: worker processes look for its modules there too.
sys.path.insert(0, str(STUDY))

TRAINING = {
    "block_size": 32,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "eval_steps": 2,
    "learning_rate": 1e-3,
    "max_eval_blocks": 2,
    "per_device_eval_batch_size": 2,
    "router_probe_tokens": 0,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Two domains of the demo's text, as parquet files."""
    folder = tmp_path_factory.mktemp("data")
    for domain in ("fiction", "travel"):
        for split in ("train", "validation"):
            lines = (TEXT / f"{domain}_{split}.jsonl").read_text("utf-8").splitlines()
            table = pyarrow.table({"text": [json.loads(line)["text"] for line in lines]})
            pyarrow.parquet.write_table(table, folder / f"{domain}_{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def study_template() -> dict:
    """A study of three methods and two seeds, as its file would say it."""
    return {
        "title": "A test",
        "text": {
            "domains": ["fiction", "travel"],
            "passage_characters": 500,
            "parent_characters": 20000,
            "upcycling_characters": 10000,
            "validation_characters": 5000,
            "vocab_size": 320,
        },
        "model": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
        "parents": {"gqa": {"num_key_value_heads": 2}},
        "parent_training": TRAINING,
        "recipe": {
            "num_experts": 4,
            "calibration_tokens": 1024,
            "calibration_block_size": 32,
            "router_aux_loss_coef": 0.01,
        },
        "training": TRAINING,
        "methods": {
            "dense": {"title": "Dense", "parents": ["gqa"]},
            "vanilla": {
                "title": "Vanilla",
                "parents": ["gqa"],
                "recipe": "vanilla_upcycling_8x0.5b",
                "settings": {"num_experts": 4},
            },
            "folded": {
                "title": "Folded",
                "parents": ["gqa"],
                "recipe": "attended_keys_8x0.5b",
                "settings": {"num_experts": 4, "num_routers": 4},
                "fold_routers": True,
            },
        },
        "baseline": "vanilla",
        "primary_comparisons": [["folded", "vanilla"]],
        "comparisons": [["folded", "dense"]],
        "seeds": [1, 2],
        "analysis": {"tokens_per_domain": 128, "block_size": 32},
    }


@pytest.fixture
def settings(study_template) -> dict:
    """The study, to be changed."""
    return deepcopy(study_template)


@pytest.fixture
def write_config(tmp_path):
    """Write a study's settings to a file and return its path."""

    def write(settings: dict) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return path

    return write
