"""What the tasks of a study do: text, tokenizer, parents, training, analysis.

Each function takes settings, the folders of its inputs by task, and the folder to write.
"""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycled_moe.common.settings import SettingsError


if TYPE_CHECKING:
    from upcycled_moe.train.arguments import Arguments

TEXT, TOKENIZER = "text", "tokenizer"
PARENT_FILE, UPCYCLING_FILE, VALIDATION_FILE = "parent.jsonl", "upcycling.jsonl", "validation.jsonl"
MODEL_FOLDER = "model"
WEIGHTS_FILE = f"{MODEL_FOLDER}/model.safetensors"
METRICS_FILE, ANALYSIS_FILE = "metrics.json", "analysis.json"
# Passages are drawn, and parents initialised, with one seed: those of the study are for what is compared.
SEED = 0


def parent_task(name: str) -> str:
    """Return the name of the task that trains the parent `name`."""
    return f"parent/{name}"


def prepare_text(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Write passages of all domains, mixed, for the parents, for upcycling, and for validation; none is in two."""
    train, validation = (
        {
            domain: _passages(inputs[f"{domain}_{split}"], settings["passage_characters"])
            for domain in settings["domains"]
        }
        for split in ("train", "validation")
    )
    _write_mixed(folder / PARENT_FILE, train, settings["parent_characters"])
    _write_mixed(folder / UPCYCLING_FILE, train, settings["upcycling_characters"])
    _write_mixed(folder / VALIDATION_FILE, validation, settings["validation_characters"])


def _passages(path: Path, num_characters: int) -> Iterator[str]:
    """Return the documents of a parquet file, cut into passages, in random order."""
    import pyarrow.parquet

    documents = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    passages = [
        document[begin : begin + num_characters]
        for document in documents
        for begin in range(0, len(document), num_characters)
    ]
    random.Random(SEED).shuffle(passages)
    return iter(passages)


def _write_mixed(path: Path, passages: Mapping[str, Iterator[str]], num_characters: int) -> None:
    """Write `num_characters` of each domain.

    The next passage is of the domain that has the least so far: any beginning of the file, such as that which routers
    are calibrated on, holds as much of each.
    """
    written = dict.fromkeys(passages, 0)
    with path.open("w", encoding="utf-8") as file:
        while written[domain := min(written, key=written.__getitem__)] < num_characters:
            if (passage := next(passages[domain], None)) is None:
                raise SettingsError(
                    f"the text of {domain!r} ends {num_characters - written[domain]} characters too early; ask for "
                    "fewer."
                )
            file.write(json.dumps({"text": passage, "domain": domain}, ensure_ascii=False) + "\n")
            written[domain] += len(passage)


def train_tokenizer(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Write Qwen's tokenizer, trained anew on the text of the parents."""
    from upcycled_moe.common import tokenizers

    with (inputs[TEXT] / PARENT_FILE).open(encoding="utf-8") as lines:
        texts = (json.loads(line)["text"] for line in lines)
        tokenizers.train_tokenizer(texts, settings["vocab_size"]).save_pretrained(folder)


def train_parent(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Train a dense Qwen2 from random weights."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, set_seed

    tokenizer = AutoTokenizer.from_pretrained(inputs[TOKENIZER])
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = Qwen2Config(vocab_size=len(tokenizer), dtype=torch.float32, **special, **settings["model"])
    set_seed(SEED)
    start = folder / "start"
    Qwen2ForCausalLM(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    run_training(settings, start, inputs[TEXT] / PARENT_FILE, inputs[TEXT] / VALIDATION_FILE, SEED, folder)


def train_method(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Upcycle a parent by one method, or leave it dense, and train it on."""
    start = inputs[settings["parent"]] / MODEL_FOLDER
    if settings["recipe"] is not None:
        # Calibrated on text that the parent has seen, so that no method sees its own text twice.
        start = _upcycle(settings, start, inputs[TEXT] / PARENT_FILE, folder)
    text, validation = inputs[TEXT] / UPCYCLING_FILE, inputs[TEXT] / VALIDATION_FILE
    run_training(settings, start, text, validation, settings["seed"], folder)


def _upcycle(settings: Mapping[str, Any], parent: Path, text: Path, folder: Path) -> Path:
    """Write the fresh MoE checkpoint below `folder` and return where it is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from upcycled_moe.conversion.convert import convert
    from upcycled_moe.conversion.recipe import ConversionRecipe
    from upcycled_moe.conversion.source import open_source

    recipe = dict(settings["recipe"], seed=settings["seed"])
    if recipe["calibration_data"]:
        recipe["calibration_data"] = [str(text)]
    out = folder / "start"
    convert(open_source(str(parent)), ConversionRecipe(**recipe), out)
    if settings["fold_routers"]:
        import modeling_upcycled_moe  # noqa: F401 (registers the classes)

        tokenizer = AutoTokenizer.from_pretrained(out)
        model = AutoModelForCausalLM.from_pretrained(out).fold_routers()
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return out


def run_training(
    settings: Mapping[str, Any], start: Path, text: Path, validation: Path, seed: int, folder: Path
) -> None:
    """Train the checkpoint `start` into `folder`, keep its metrics and its model, and delete the rest."""
    from transformers import AutoConfig

    from upcycled_moe.common.flops import training_flops_per_token
    from upcycled_moe.common.provenance import read_provenance
    from upcycled_moe.train.arguments import build_arguments
    from upcycled_moe.train.data.blocks import blocks_per_step
    from upcycled_moe.train.train import train

    model = folder / MODEL_FOLDER
    arguments = build_arguments(training_settings(settings["training"], start, text, validation, seed, model))
    digest = blocks_digest(arguments)
    train(arguments)
    state = json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(model)
    # Of a dense start it has the training only.
    provenance = read_provenance(start) or {}
    metrics = {
        "log": state["log_history"],
        "blocks_digest": digest,
        "tokens_per_step": blocks_per_step(arguments.training) * arguments.data.block_size,
        "num_parameters": _num_parameters(model),
        "flops_per_token": training_flops_per_token(config, settings["training"]["block_size"]),
        "upcycling": provenance if "recipe" in provenance else None,
    }
    (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    if start.is_relative_to(folder):
        shutil.rmtree(start)


def blocks_digest(arguments: "Arguments") -> str:
    """Return a digest of the blocks that a run trains on, in their order, and of those that it evaluates."""
    from upcycled_moe.train.data.blocks import blocks_per_step, evaluation_sets
    from upcycled_moe.train.data.sources import training_blocks
    from upcycled_moe.train.model import load_tokenizer

    training = arguments.training
    tokenizer = load_tokenizer(arguments.model)
    num_blocks = training.max_steps * blocks_per_step(training)
    seen = hashlib.sha256()
    for block in islice(training_blocks(arguments.data, tokenizer, training.seed), num_blocks):
        seen.update(json.dumps(block["input_ids"]).encode())
    for domain, blocks in evaluation_sets(arguments.data, training, tokenizer).items():
        seen.update(json.dumps([domain, blocks["input_ids"][:]]).encode())
    return seen.hexdigest()


def _num_parameters(model: Path) -> int:
    """Return the parameters of a checkpoint; tied ones count once."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def training_settings(
    training: Mapping[str, Any], start: Path, text: Path, validation: Path, seed: int, out: Path
) -> dict[str, Any]:
    """Return the settings of `train.py` for one run: those of the study, its text, and its seed."""
    return {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "eval_on_start": True,
        **training,
        "model_name_or_path": str(start),
        "output_dir": str(out),
        "train_data": [str(text)],
        "eval_data": [str(validation)],
        # Tokenized once for all runs, then in an order that depends on the seed only.
        "streaming": False,
        "seed": seed,
    }


def analyze_method(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Write the figures of a trained model, by measure and layer."""
    from upcycled_moe.analysis.analyze import analyze
    from upcycled_moe.analysis.settings import AnalysisSettings

    report = analyze(
        [str(inputs[settings["trained"]] / MODEL_FOLDER)],
        AnalysisSettings(
            data=[str(inputs[TEXT] / VALIDATION_FILE)],
            parent=str(inputs[settings["parent"]] / MODEL_FOLDER),
            **settings["analysis"],
        ),
    )
    (checkpoint,) = report.checkpoints
    figures = {name: measure.per_layer for name, measure in checkpoint.measures.items()}
    (folder / ANALYSIS_FILE).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
