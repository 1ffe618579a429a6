"""What a reward model's training leaves beside the weights: its settings, its evaluation, its provenance and card."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...common.files import replacing, write_text
from ...common.provenance import recorded_name
from ...model_cards.training import preference_facts, preference_figures
from ...preference.template import TokenizedPairs
from ..model import CONFIG_FIELDS
from ..saving.card import CardCallback
from ..saving.checkpoints import CONFIG_FILE
from .reward_arguments import RewardArguments, resolved_settings


if TYPE_CHECKING:
    from .reward_trainer import RewardModelTrainer

EVALUATION_FILE = "reward_evaluation.json"
PACKAGES = ("upcycled-moe", "transformers", "trl", "accelerate", "torch")


def write_reward_config(arguments: RewardArguments, trainer: "RewardModelTrainer") -> None:
    """Write the settings of a run, as they are in effect, for `--config`; what no setting says is a comment above."""
    config, args = trainer.model.config, arguments.training
    settings = resolved_settings(arguments) | {"max_steps": args.max_steps}
    settings |= {name: getattr(config, name) for name in CONFIG_FIELDS if hasattr(config, name)}
    lines = [
        ", ".join(f"{package} {version(package)}" for package in PACKAGES),
        f"{args.world_size} processes, {_pairs_per_step(arguments)} pairs a step",
    ]
    header = "".join(f"# {line}\n" for line in lines)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (folder / CONFIG_FILE).write_text(header + text, encoding="utf-8")


def _pairs_per_step(arguments: RewardArguments) -> int:
    args = arguments.training
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def write_reward_evaluation(metrics: Mapping[str, float], folder: str) -> None:
    """Write the evaluation as JSON: `all` is that of all pairs, `sources` has that of each source."""
    with replacing(Path(folder, EVALUATION_FILE)) as partial:
        write_text(partial, json.dumps(preference_figures(metrics), indent=2) + "\n")


def evaluation_table(metrics: Mapping[str, float]) -> str:
    """Return the evaluation by source as a table."""
    figures = preference_figures(metrics)
    rows = {"all pairs": figures["all"], **figures["sources"]}
    width = max(len(name) for name in ("source", *rows))
    lines = [f"{'source':<{width}}  {'pairs':>6}  accuracy  longer wins   margin     loss"]
    for name, row in rows.items():
        lines.append(
            f"{name:<{width}}  {row['pairs']:>6,}  {row['accuracy']:>8.3f}  {row['length_baseline']:>11.3f}  "
            f"{row['margin']:>7.3f}  {row['loss']:>7.4f}"
        )
    return "\n".join(lines)


def reward_card_callback(arguments: RewardArguments, start: Path, pairs: TokenizedPairs) -> CardCallback:
    """Return the callback for a run on `pairs` that begins with the checkpoint in the folder `start`."""
    model = arguments.model
    is_local = Path(model.model_name_or_path).is_dir()
    # A revision says that the name is one on the Hub.
    revision = None if is_local else model.model_revision or "main"
    name = recorded_name(model.model_name_or_path, start) if is_local else model.model_name_or_path
    source = {"name": name, "revision": revision}
    return _RewardCardCallback(arguments, source, start, pairs)


class _RewardCardCallback(CardCallback):
    """Tells of pairs, where that of text tells of tokens."""

    def __init__(self, arguments: RewardArguments, source: Mapping[str, Any], start: Path, pairs: TokenizedPairs):
        _, data, args, _ = arguments
        super().__init__(args.output_dir, source, start, tokens_per_step=None)
        self.steps_per_epoch = args.steps_per_epoch(len(pairs.rows))
        self.pairs = {
            "pairs": len(pairs.rows),
            "pairs_too_long": pairs.num_too_long,
            "max_length": args.max_length,
            "max_train_pairs": data.max_train_pairs,
            "flip_rate": data.flip_rate,
        }

    def _facts(self, state, best_step: int | None) -> dict[str, Any]:
        facts = super()._facts(state, best_step)
        epochs = round(facts["steps"] / self.steps_per_epoch, 4)
        return facts | preference_facts(state.log_history, facts["steps"], epochs, self.pairs)
