"""A checkpoint folder is all that anyone needs: fresh processes load it where this package cannot be imported."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoConfig
from warm_python import WarmPython

from modeling_upcycled_moe import (
    UpcycledQwenMoeForCausalLM,
    UpcycledQwenMoeForSequenceClassification,
    UpcycledQwenMoeModel,
)


CODE_FILES = {
    "chunked_loss_upcycled_moe.py",
    "configuration_upcycled_moe.py",
    "losses_upcycled_moe.py",
    "modeling_upcycled_moe.py",
    "routers_upcycled_moe.py",
    "selection_upcycled_moe.py",
}
AUTO_CLASSES = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}

# Loads `folder` by each Auto class, saves what it loaded again, and says what it saw.
LOAD_AND_SAVE = """
import importlib.util, json, sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_upcycled_moe", "upcycled_moe"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for package in ("modeling_upcycled_moe", "upcycled_moe"):
    try:
        __import__(package)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{package} can be imported: this process would show nothing")

import torch, transformers

folder, out = sys.argv[1:]
tokens = torch.tensor([[5, 17, 99, 3, 42, 8, 120, 33]])
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
report = {"AutoConfig": {"class": type(config).__name__, "module": type(config).__module__}}
config.save_pretrained(f"{out}/AutoConfig")
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        outputs = model(tokens, output_router_logits=True)
    values = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
    torch.save(values, f"{out}/{name}.pt")
    report[name] = {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "experts": model.config._experts_implementation,
        "num_router_logits": len(outputs.router_logits),
    }
    model.save_pretrained(f"{out}/{name}")
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def load_in_a_fresh_process(tmp_path_factory):
    """`load_in_a_fresh_process(folder, out)`: what LOAD_AND_SAVE saw, with a cache that was empty before."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))},
        "HF_HOME": str(cache),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    with WarmPython(environment) as python:

        def load(folder, out) -> dict:
            shutil.rmtree(cache)
            out.mkdir()
            process = python.run(LOAD_AND_SAVE, folder, out, cwd=out)
            assert process.returncode == 0, process.stderr
            # It was this cache that the code went through.
            assert list(cache.glob("modules/transformers_modules/*"))
            return json.loads(process.stdout)

        yield load


def check_is_self_contained(folder):
    written = json.loads((folder / "config.json").read_text())
    assert written["auto_map"].keys() == AUTO_CLASSES
    assert not any("--" in reference for reference in written["auto_map"].values())
    assert {path.name for path in folder.glob("*.py")} == CODE_FILES


@pytest.mark.parametrize(
    ("auto_class", "model_class", "fields"),
    [
        (
            "AutoModel",
            UpcycledQwenMoeModel,
            {"router_type": "mlp", "router_score_function": "sigmoid", "use_router_bias": True},
        ),
        (
            "AutoModelForCausalLM",
            UpcycledQwenMoeForCausalLM,
            {"shared_expert_intermediate_size": 16, "num_routers": 8, "router_pooling": "max"},
        ),
        (
            "AutoModelForSequenceClassification",
            UpcycledQwenMoeForSequenceClassification,
            {
                "router_type": "grouped_average",
                "router_selection": "top_p",
                "router_top_p": 0.4,
                "num_copy_experts": 2,
                "num_constant_experts": 2,
            },
        ),
    ],
)
def test_a_folder_loads_saves_and_loads_again_without_the_package(
    load_in_a_fresh_process, make_moe, tmp_path, auto_class, model_class, fields
):
    model = make_moe(model_class, **fields)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    check_is_self_contained(saved)
    with torch.no_grad():
        outputs = model(torch.tensor([[5, 17, 99, 3, 42, 8, 120, 33]]))
    expected = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state

    first = load_in_a_fresh_process(saved, tmp_path / "first")
    for seen in first.values():
        assert seen["module"].startswith("transformers_modules.")
    for name in AUTO_CLASSES - {"AutoConfig"}:
        assert first[name]["experts"] == "grouped_mm"
        assert first[name]["num_router_logits"] == 3
    assert first[auto_class]["class"] == model_class.__name__
    torch.testing.assert_close(torch.load(tmp_path / "first" / f"{auto_class}.pt"), expected, rtol=0, atol=2e-6)

    saved_again = tmp_path / "first" / auto_class
    for name in AUTO_CLASSES - {"AutoConfig"}:
        check_is_self_contained(tmp_path / "first" / name)
    check_is_self_contained(tmp_path / "first" / "AutoConfig")
    second = load_in_a_fresh_process(saved_again, tmp_path / "second")
    assert second == {name: {**seen, "module": second[name]["module"]} for name, seen in first.items()}
    torch.testing.assert_close(torch.load(tmp_path / "second" / f"{auto_class}.pt"), expected, rtol=0, atol=2e-6)


def test_with_the_package_installed_its_own_classes_load_a_folder_too(make_moe, tmp_path):
    make_moe().save_pretrained(tmp_path)

    config = AutoConfig.from_pretrained(tmp_path)

    assert type(config).__module__ == "modeling_upcycled_moe.configuration_upcycled_moe"
