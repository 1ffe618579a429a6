"""Models of a study: the policy, gold, and the reward models that are optimised; and their best-of-n curves."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import commands
from .files import (
    CURVES_FOLDER,
    GOLD,
    GOLD_PAIRS,
    GOLD_TRAIN_FILE,
    MODEL_FOLDER,
    ORIGINS_FILE,
    PAIRS_FILE,
    POLICY,
    POLICY_TEXT_FILE,
    POLICY_VALIDATION_FILE,
    PREFERENCES_FILE,
    SAMPLES,
    TABLE_FILE,
    TEXT,
    read_lines,
)
from .text_stages import SEED


SHARED, AVERAGE, LEARNED = "shared", "average", "learned"
_RUN = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}


def train_policy(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Train a dense Qwen2 from random weights on exchanges of people."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    from upcycled_moe.common import tokenizers
    from upcycled_moe.preference.template import CHATML

    texts = (row["text"] for row in read_lines(inputs[TEXT] / POLICY_TEXT_FILE))
    tokenizer = tokenizers.train_tokenizer(texts, settings["vocab_size"])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    # As Qwen's own: a turn ends an answer, and padding is another token, which no conversation holds.
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.eos_token, "<|im_end|>"
    tokenizer.chat_template = CHATML
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    config = Qwen2Config(vocab_size=len(tokenizer), dtype=torch.float32, **special, **settings["model"])
    set_seed(SEED)
    start = folder / "start"
    Qwen2ForCausalLM(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    commands.train_policy(
        {
            **_RUN,
            **settings["training"],
            "model_name_or_path": start,
            "output_dir": folder / MODEL_FOLDER,
            "train_data": inputs[TEXT] / POLICY_TEXT_FILE,
            "eval_data": inputs[TEXT] / POLICY_VALIDATION_FILE,
            "streaming": False,
            "seed": SEED,
        }
    )
    shutil.rmtree(start)


def train_gold(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Train the gold reward model from the policy; its accuracy on held-out pairs is in its log."""
    pairs = inputs[GOLD_PAIRS]
    heldout = {"eval_data": f"[{pairs / PREFERENCES_FILE}, {pairs / ORIGINS_FILE}]"}
    start = inputs[POLICY] / MODEL_FOLDER
    _train_reward({**settings["training"], **heldout}, start, pairs / GOLD_TRAIN_FILE, SEED, folder)


def train_proxy(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Train a reward model on the pairs of a world: from the policy, or from the first half of its training."""
    start = inputs[settings["start"]] / MODEL_FOLDER
    if settings["recipe"] is not None:
        moe = folder / "moe"
        commands.upcycled_moe("convert", start, moe, *commands.flags({**settings["recipe"], "seed": settings["seed"]}))
        start = moe
    pairs = inputs[settings["labels"]] / PAIRS_FILE
    _train_reward(settings["training"], start, pairs, settings["seed"], folder)
    if settings["recipe"] is not None:
        shutil.rmtree(start)


def _train_reward(training: Mapping[str, Any], start: Path, pairs: Path, seed: int, folder: Path) -> None:
    commands.train_reward(
        {
            **_RUN,
            **training,
            "model_name_or_path": start,
            "output_dir": folder / MODEL_FOLDER,
            "train_data": pairs,
            "seed": seed,
        }
    )


def merge_experts(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Merge a MoE reward model into a dense one by one method."""
    moe = inputs[settings["moe"]] / MODEL_FOLDER
    learning = []
    if settings["method"] == LEARNED:
        pairs = inputs[settings["labels"]] / PAIRS_FILE
        learning = ["--data", pairs, "--loss", "bradley_terry", *commands.flags(settings["learned_merge"])]
        learning += ["--seed", settings["seed"]]
    commands.upcycled_moe("merge", moe, folder / MODEL_FOLDER, "--method", settings["method"], *learning)


def measure_world(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Measure what choosing the best of n by each reward model does to gold, on the one table of all worlds."""
    models = [
        f"{method}={inputs[task] / MODEL_FOLDER}" for method, tasks in settings["models"].items() for task in tasks
    ]
    ensembles = [
        f"--ensemble={name}={method}:{settings['baseline']}" for name, method in settings["ensembles"].items()
    ]
    commands.upcycled_moe(
        *("overoptimization", "--samples", inputs[SAMPLES] / TABLE_FILE),
        *("--gold", inputs[GOLD] / MODEL_FOLDER, "--reward-models", *models, *ensembles),
        *("--baseline", settings["baseline"], "--output", folder / CURVES_FOLDER, "--seed", SEED),
        *commands.flags(settings["scoring"]),
    )
