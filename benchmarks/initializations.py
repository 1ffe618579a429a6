"""How far a fresh model is from its dense parent, for each way to start: the demo's parent and validation text.

    python benchmarks/initializations.py [--out runs/initializations]

The parent is trained first (half a minute on two cores), or taken from `--out` if it is there.
"""

import argparse
import shutil
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import machine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from upcycled_moe.common.text import open_text, pack_blocks
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source
from upcycled_moe.demo.__main__ import TRAIN_TEXT, VALIDATION_TEXT, Size, train
from upcycled_moe.demo.parent import write_parent


BLOCK_SIZE, NUM_BLOCKS = 256, 32
SLICES = {"experts": "split", "expert_granularity": 4, "num_experts": 32, "num_experts_per_tok": 8}
# Name: settings of a recipe. Routers are linear and drawn at random unless they are what is looked at.
METHODS = {
    "`copy`": {},
    "`copy`, `router: mixture`": {"router": "mixture"},
    "`copy`, `router_score_function: sigmoid`": {"router_score_function": "sigmoid"},
    "`copy`, `router_selection: top_p`": {"router_selection": "top_p", "router_top_p": 0.4},
    "`shared_expert: sigmoid`": {"shared_expert": "sigmoid"},
    "`shared_expert: plain`": {"shared_expert": "plain"},
    "`shared_expert: complement`": {"shared_expert": "complement"},
    "`split`, 4 slices": SLICES,
    "`split`, 4 slices, `prototype_top_k`": SLICES | {"router_selection": "prototype_top_k", "num_expert_groups": 4},
    "`noise`, 0.01": {"experts": "noise"},
    "`noise`, 0.1": {"experts": "noise", "expert_noise": 0.1},
    "`noise`, 0.5": {"experts": "noise", "expert_noise": 0.5},
    "`drop`, 0.1": {"experts": "drop", "drop_ratio": 0.1},
    "`drop`, 0.5": {"experts": "drop"},
    "`random` experts": {"experts": "random"},
    "top-1, `norm_topk_prob: false`": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "top-2, `norm_topk_prob: false`": {"norm_topk_prob": False},
    "1 zero expert": {"num_zero_experts": 1},
    "1 copy expert": {"num_copy_experts": 1},
    "1 constant expert": {"num_constant_experts": 1},
    "`backbone: random`, `random` experts": {"backbone": "random", "experts": "random"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/initializations"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    dense = options.out / "dense"
    if not (dense / "config.json").exists():
        write_parent(options.out / "parent", TRAIN_TEXT)
        train("dense", options.out / "parent", dense, Size.dense_steps)
    tokens = validation_blocks(dense)
    expected = log_probabilities(dense, tokens)

    print(machine())
    print(
        "\n| start | `plan` says | largest |Δlog p| | KL, nats | same argmax | loss |".replace(
            "|Δlog p|", "\\|Δlog p\\|"
        )
    )
    print("|---|---|---:|---:|---:|---:|")
    print(f"| the dense parent | | | | | {loss_of(expected, tokens):.3f} |")
    for name, settings in METHODS.items():
        recipe = ConversionRecipe(**{"router": "linear", **calibration(settings), **settings})
        result = convert(open_source(str(dense)), recipe, options.out / "moe", overwrite=True)
        actual = log_probabilities(result.folder, tokens)
        difference = (actual - expected).abs().max()
        divergence = F.kl_div(actual, expected, log_target=True, reduction="none").sum(-1).mean()
        agreement = (actual.argmax(-1) == expected.argmax(-1)).double().mean()
        print(
            f"| {name} | {result.plan.preserves_function} | {difference:.1e} | {divergence:.1e} | {agreement:.1%} | "
            f"{loss_of(actual, tokens):.3f} |"
        )
        shutil.rmtree(result.folder)


def calibration(settings: dict) -> dict:
    """Return the settings that give a router its text, if it needs some."""
    if settings.get("router") != "mixture":
        return {}
    return {"calibration_data": list(map(str, TRAIN_TEXT)), "calibration_tokens": 8192, "calibration_block_size": 256}


def validation_blocks(dense: Path) -> torch.Tensor:
    """Return validation text as token ids [N, S]."""
    blocks = pack_blocks(open_text(list(map(str, VALIDATION_TEXT))), AutoTokenizer.from_pretrained(dense), BLOCK_SIZE)
    return torch.tensor([block["input_ids"] for block in islice(blocks, NUM_BLOCKS)])


@torch.no_grad()
def log_probabilities(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the next token [N, S, V] of the model in `folder`, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.cat([model(batch).logits.log_softmax(-1) for batch in tokens.split(4)])


def loss_of(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return the mean cross-entropy in nats a token."""
    return F.nll_loss(log_probabilities[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


if __name__ == "__main__":
    main()
