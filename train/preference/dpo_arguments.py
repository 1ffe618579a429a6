"""Settings of iterative DPO. trl is imported only once settings are built, so that `--help` answers at once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ...common.settings import SettingsError
from ...preference.settings import check_trl
from ..arguments import CheckpointArguments, build_group, build_groups, help_text, read_settings, setting_types
from .dpo_checks import check_arguments, without_effect


if TYPE_CHECKING:
    from .dpo_training_arguments import DPOTrainingArguments


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class PolicyArguments(CheckpointArguments):
    """The policy that the rounds begin with, π_0."""

    chat_template: str | None = field(
        default=None, metadata=_help("File with one, or chatml, where the tokenizer has none, or another.")
    )


@dataclass
class RoundArguments:
    """Rounds, the reference of each, and the pairs of each."""

    num_rounds: int = field(default=3, metadata=_help("Rounds of DPO, each from the policy of the one before."))
    reference: Literal["last", "uniform", "ema", "learned"] = field(
        default="learned",
        metadata=_help(
            "What a round's policy is held to: the last policy, or the mean, the moving average, or a learned merge "
            "of all of them so far."
        ),
    )
    ema_decay: float = field(
        default=0.5, metadata=_help("For ema: what the reference of the round before counts in the next.")
    )
    round_data: Literal["same", "shares", "on_policy"] = field(
        default="shares",
        metadata=_help(
            "Pairs of a round: all, an equal share of them, or the policy's own answers to the prompts of that share."
        ),
    )


@dataclass
class PairArguments:
    """Preference pairs to train on and to measure with."""

    train_data: list[str] = field(
        default_factory=list, metadata=_help("Files (parquet, jsonl), folders, globs, Hub datasets of pairs.")
    )
    eval_data: list[str] = field(default_factory=list, metadata=_help("The same, to measure every policy with."))
    train_split: str = field(default="train", metadata=_help("Split of a Hub dataset or of a folder's files."))
    eval_split: str = field(default="test", metadata=_help("The same, for eval_data."))
    max_train_pairs: int | None = field(default=None, metadata=_help("The first so many of train_data; null for all."))
    max_eval_pairs: int | None = field(default=None, metadata=_help("The same, of eval_data."))
    flip_rate: float = field(
        default=0.0, metadata=_help("Share of training pairs whose answers are exchanged: label noise.")
    )


@dataclass
class MergeArguments:
    """How a learned reference is learned."""

    merge_data: list[str] = field(
        default_factory=list, metadata=_help("Pairs to learn it from; by default merge_share of train_data.")
    )
    merge_share: float = field(
        default=0.1,
        metadata=_help("Share of train_data that no round trains on, whatever the reference; none with merge_data."),
    )
    merge_per: Literal["model", "layer"] = field(
        default="model", metadata=_help("One weight for each policy, or one for each policy in each layer.")
    )
    merge_learning_rate: float = field(default=0.1, metadata=_help("Of Adam on the logits of the weights."))
    merge_max_steps: int = field(default=50, metadata=_help("Optimizer steps of it."))
    merge_batch_size: int = field(default=8, metadata=_help("Pairs in each of them, on each process."))


@dataclass
class SamplingArguments:
    """Answers of the policy's own: to train on with round_data=on_policy, and to measure."""

    reward_model: str | None = field(
        default=None, metadata=_help("Checkpoint that labels the best and the worst answer of a prompt.")
    )
    samples_per_prompt: int = field(default=4, metadata=_help("Answers that it chooses from."))
    temperature: float = field(default=1.0, metadata=_help("Of the softmax when these are drawn."))
    max_new_tokens: int = field(default=256, metadata=_help("Of an answer."))
    sampling_batch_size: int = field(default=16, metadata=_help("Answers drawn, or scored, at a time."))
    eval_samples: int = field(
        default=0, metadata=_help("Prompts of eval_data that each policy answers, for its divergence from π_0.")
    )
    eval_reward_model: str | None = field(
        default=None, metadata=_help("Checkpoint that scores these answers; another than reward_model.")
    )


@dataclass
class DPOArguments:
    """What this recipe sets otherwise than trl's DPOConfig; all of it is for one round."""

    output_dir: str | None = field(default=None, metadata=_help("Folder for the rounds, their policies and figures."))
    beta: float = field(default=0.1, metadata=_help("What a policy's distance from its reference costs."))
    max_length: int = field(default=1024, metadata=_help("Tokens of a prompt with an answer; answers are cut."))
    num_train_epochs: float = field(default=1.0, metadata=_help("Passes over a round's pairs."))
    max_steps: int = field(default=-1, metadata=_help("Optimizer steps of a round instead, if above zero."))
    learning_rate: float = field(default=5e-7, metadata=_help("Peak learning rate."))
    lr_scheduler_type: str = field(default="linear", metadata=_help("Any of Transformers'."))
    warmup_steps: float = field(default=0.1, metadata=_help("Steps of warm-up; below 1 a share of a round's."))
    per_device_train_batch_size: int = field(default=4, metadata=_help("Pairs in a process's micro-batch."))
    per_device_eval_batch_size: int = field(default=16, metadata=_help("Answers scored at a time."))
    bf16: bool = field(default=False, metadata=_help("Mixed precision."))
    gradient_checkpointing: bool = field(default=False, metadata=_help("Compute activations twice, store fewer."))
    logging_steps: float = field(default=10, metadata=_help("Steps from one log to the next."))
    save_steps: float = field(default=100, metadata=_help("Steps from one checkpoint within a round to the next."))
    save_total_limit: int | None = field(default=1, metadata=_help("How many of them are kept."))
    report_to: str | list[str] | None = field(default="none", metadata=_help("tensorboard, wandb, ... or none."))
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata=_help("Every parameter takes part in every step.")
    )


class IterativeDPOArguments(NamedTuple):
    """All settings of a run, and those that were given."""

    policy: PolicyArguments
    rounds: RoundArguments
    pairs: PairArguments
    merge: MergeArguments
    sampling: SamplingArguments
    training: "DPOTrainingArguments"
    given: dict[str, Any]


GROUPS = (PolicyArguments, RoundArguments, PairArguments, MergeArguments, SamplingArguments, DPOArguments)

USAGE = """\
usage: accelerate launch train/iterative_dpo.py --config FILE.yaml [key=value | --key value | --key=value]...

Trains a policy by rounds of DPO. What is given later wins: defaults, --config, command line. The same command goes on
with a run that was stopped.
"""

# Fields of trl's DPOConfig, and so of TrainingArguments, that act on a round as they do elsewhere. What is not here is
# set by the rounds, such as precompute_ref_log_probs, or would do nothing or something else than its name says: trl
# discounts long answers by ld_alpha in the reference too, whose log-probabilities are plain sums here.
TRL_SETTINGS = frozenset(
    {
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "data_seed",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_timeout",
        "disable_dropout",
        "f_alpha_divergence_coef",
        "f_divergence_type",
        "fp16",
        "full_determinism",
        "gradient_accumulation_steps",
        "gradient_checkpointing_kwargs",
        "label_smoothing",
        "discopop_tau",
        "log_level",
        "log_level_replica",
        "logging_first_step",
        "loss_type",
        "loss_weights",
        "lr_scheduler_kwargs",
        "max_grad_norm",
        "optim",
        "optim_args",
        "pad_to_multiple_of",
        "run_name",
        "save_strategy",
        "seed",
        "tf32",
        "torch_empty_cache_steps",
        "use_cpu",
        "use_weighting",
        "weight_decay",
    }
)


def format_help() -> str:
    """Return the text of `--help`."""
    names = ", ".join(sorted(TRL_SETTINGS))
    ending = f"Fields of trl's DPOConfig, and so of TrainingArguments, that are settings too:\n{fill(names, 118)}"
    return help_text(USAGE, GROUPS, ending)


def parse_arguments(argv: Sequence[str]) -> IterativeDPOArguments:
    """Return the settings of the command line `argv`, checked.

    Raises:
        SettingsError: at the first setting that is unknown, of the wrong type, missing, or impossible; or without trl.
    """
    check_trl("iterative DPO")
    from .dpo_training_arguments import DPOTrainingArguments

    groups = (*GROUPS[:-1], DPOTrainingArguments)
    own = {setting.name for group in GROUPS for setting in fields(group)}
    types = {name: hint for name, hint in setting_types(groups).items() if name in own | TRL_SETTINGS}
    given = read_settings(argv, types)
    for name in ("model_name_or_path", "output_dir", "train_data", "eval_data"):
        if not given.get(name):
            raise SettingsError(f"{name} is missing; give it in the --config file or as {name}=...")
    arguments = IterativeDPOArguments(*build_groups(groups, given), given=given)
    check_arguments(arguments)
    return arguments


def resolved_settings(arguments: IterativeDPOArguments) -> dict[str, Any]:
    """Return the settings of a run, with the defaults spelt out, as a file that `--config` takes.

    Those without effect are left out: they would be refused.
    """
    settings: dict[str, Any] = {}
    for group in GROUPS:
        settings |= asdict(build_group(group, arguments.given))
    settings |= {"seed": arguments.training.seed} | arguments.given
    idle = without_effect(arguments)
    return {name: value for name, value in settings.items() if name not in idle}
