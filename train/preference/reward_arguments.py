"""Settings of a reward model's training: defaults, a YAML file, and the command line, each overriding the one before.

Torch and trl are imported only once settings are built, so that `--help` answers at once.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ...common.settings import SettingsError
from ...preference.settings import check_trl
from ..arguments import CheckpointArguments, build_group, build_groups, help_text, read_settings, setting_types


if TYPE_CHECKING:
    from .reward_training_arguments import RewardTrainingArguments


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class RewardModelArguments(CheckpointArguments):
    """Which model is trained: a reward model, or a language model, which gets a new head for the score."""

    chat_template: str | None = field(
        default=None,
        metadata=_help("File with the format of conversations, or chatml; the tokenizer's own by default."),
    )


@dataclass
class PairArguments:
    """Preference pairs to train on and to measure."""

    train_data: list[str] = field(
        default_factory=list, metadata=_help("Files (parquet, jsonl, json), folders, globs, Hub datasets.")
    )
    eval_data: list[str] = field(
        default_factory=list, metadata=_help("The same, for accuracy, margin and loss of each source.")
    )
    train_split: str = field(default="train", metadata=_help("Split of a Hub dataset or of a folder's files."))
    eval_split: str = field(default="test", metadata=_help("The same, for eval_data."))
    max_train_pairs: int | None = field(
        default=None, metadata=_help("The first so many of all, with those that are too long; null for all.")
    )
    max_eval_pairs: int | None = field(default=None, metadata=_help("The same, of eval_data."))
    flip_rate: float = field(
        default=0.0, metadata=_help("Share of train_data, drawn at random, whose answers are exchanged: label noise.")
    )


@dataclass
class RewardRecipeArguments:
    """What this recipe adds to trl's RewardConfig, or sets otherwise than it does."""

    output_dir: str | None = field(default=None, metadata=_help("Folder for checkpoints, logs and the final model."))
    max_length: int = field(
        default=1024, metadata=_help("Tokens of a conversation; pairs with a longer one are left out.")
    )
    num_train_epochs: float = field(default=1.0, metadata=_help("Passes over the pairs."))
    max_steps: int = field(default=-1, metadata=_help("Optimizer steps instead, if above zero."))
    learning_rate: float = field(default=1e-5, metadata=_help("Peak learning rate."))
    lr_scheduler_type: str = field(default="linear", metadata=_help("Any of Transformers'."))
    warmup_steps: float = field(default=0.1, metadata=_help("Steps of linear warm-up; below 1 a share of all."))
    weight_decay: float = field(default=0.0, metadata=_help("Weight decay, on all weights but biases and norms."))
    per_device_train_batch_size: int = field(default=8, metadata=_help("Pairs in a process's micro-batch."))
    per_device_eval_batch_size: int = field(default=16, metadata=_help("Conversations scored at a time."))
    bf16: bool = field(default=False, metadata=_help("Mixed precision."))
    gradient_checkpointing: bool = field(default=False, metadata=_help("Compute activations twice, store fewer."))
    logging_steps: float = field(default=10, metadata=_help("Steps from one log to the next."))
    eval_strategy: str | None = field(
        default=None, metadata=_help("steps, no, ...; by default steps where there are eval_data and eval_steps.")
    )
    report_to: str | list[str] | None = field(default="none", metadata=_help("tensorboard, wandb, ... or none."))
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata=_help("Every parameter takes part in every step.")
    )
    router_collapse_threshold: float = field(
        default=0.3,
        metadata=_help("Warn of layers that use their experts less evenly: 1 alike, 0 the same for all; 0 never."),
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata=_help(
            "A checkpoint folder; last: the newest in output_dir; auto: the same, or a fresh start without one."
        ),
    )


class RewardArguments(NamedTuple):
    """All settings of a run, and those that were given."""

    model: RewardModelArguments
    data: PairArguments
    training: "RewardTrainingArguments"
    given: dict[str, Any]


GROUPS = (RewardModelArguments, PairArguments, RewardRecipeArguments)

USAGE = """\
usage: accelerate launch train/reward.py --config FILE.yaml [key=value | --key value | --key=value | --flag]...

Trains a reward model, MoE or dense, on preference pairs. What is given later wins: defaults, --config, command line.
"""

# Fields of trl's RewardConfig, and so of TrainingArguments, that are settings too. The others do nothing here, or
# something else sets them.
TRAINER_SETTINGS = frozenset(
    {
        *("gradient_accumulation_steps", "max_grad_norm", "fp16", "tf32", "neftune_noise_alpha"),
        *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("lr_scheduler_kwargs", "seed", "data_seed", "full_determinism", "train_sampling_strategy"),
        *("disable_dropout", "center_rewards_coefficient", "pad_to_multiple_of", "activation_offloading"),
        *("gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("torch_empty_cache_steps", "use_cpu"),
        *("eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model"),
        *("greater_is_better", "save_strategy", "save_steps", "save_total_limit", "save_only_model"),
        *("save_on_each_node", "ignore_data_skip"),
        *("logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_level", "log_level_replica"),
        *("log_on_each_node", "disable_tqdm", "run_name", "project", "trackio_space_id"),
        *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor"),
        *("ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        # The arguments say what there is instead.
        *("deepspeed", "fsdp", "fsdp_config"),
    }
)


def format_help() -> str:
    """Return the text of `--help`."""
    ending = f"Fields of trl's RewardConfig, and so of TrainingArguments, too: {', '.join(sorted(TRAINER_SETTINGS))}."
    return help_text(USAGE, GROUPS, ending)


def parse_arguments(argv: Sequence[str]) -> RewardArguments:
    """Return the settings of the command line `argv`, checked.

    Raises:
        SettingsError: at the first setting that is unknown, of the wrong type, missing, or impossible; or without trl.
    """
    check_trl("Training a reward model")
    from .reward_training_arguments import RewardTrainingArguments

    groups = (RewardModelArguments, PairArguments, RewardTrainingArguments)
    given = read_settings(argv, setting_types(groups))
    _check(given)
    return RewardArguments(*build_groups(groups, given), given=given)


def _check(given: dict[str, Any]) -> None:
    """Check settings that are numbers of something, and settle those that follow from others.

    Raises:
        SettingsError: at the first that is missing, out of range or without effect.
    """
    accepted = setting_types(GROUPS).keys() | TRAINER_SETTINGS
    if refused := [name for name in given if name not in accepted]:
        raise SettingsError(
            f"{refused[0]} is no setting of a reward model's training: it would do nothing here, or something else "
            "sets it; leave it out."
        )
    for name in ("model_name_or_path", "output_dir", "train_data"):
        if not given.get(name):
            raise SettingsError(f"{name} is missing; give it in the --config file or as {name}=...")
    counts = ("max_length", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for name in (*counts, "max_train_pairs", "max_eval_pairs"):
        if (value := given.get(name)) is not None and value < 1:
            raise SettingsError(f"{name}={value} must be at least 1.")
    if not 0 <= given.get("flip_rate", 0) <= 1:
        raise SettingsError(f"flip_rate={given['flip_rate']:g} is outside [0, 1].")
    for name in ("learning_rate", "num_train_epochs"):
        if not 0 < given.get(name, 1) < math.inf:
            raise SettingsError(f"{name}={given[name]:g} must be above zero.")
    if given.get("eval_strategy") is None:
        has_steps = given.get("eval_data") and given.get("eval_steps") is not None
        given["eval_strategy"] = "steps" if has_steps else "no"
    if not given.get("eval_data"):
        # Shipped settings ask for it wherever there is something to evaluate.
        given["eval_on_start"] = False
        if given["eval_strategy"] != "no":
            raise SettingsError(f"eval_strategy={given['eval_strategy']} needs eval_data, which is missing.")


def resolved_settings(arguments: RewardArguments) -> dict[str, Any]:
    """Return the settings of a run, with the defaults spelt out, as a file that `--config` takes."""
    settings: dict[str, Any] = {}
    for group in GROUPS:
        settings |= asdict(build_group(group, arguments.given))
    settings |= {"seed": arguments.training.seed} | arguments.given
    return {name: value for name, value in settings.items() if name != "resume_from_checkpoint"}
