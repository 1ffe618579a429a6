"""Settings of a training run: defaults, a YAML file, and the command line, each overriding the one before.

Torch is imported only once settings are built, so that `--help` answers at once.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_type_hints

from ..common.settings import SettingsError, check_keys, load_yaml, parse_override


if TYPE_CHECKING:
    from .training_arguments import UpcyclingTrainingArguments


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class CheckpointArguments:
    """Which model is trained, and what of its configuration changes."""

    model_name_or_path: str | None = field(
        default=None, metadata=_help("Folder or Hub id of the checkpoint to start from: MoE or dense.")
    )
    model_revision: str | None = field(default=None, metadata=_help("Branch, tag or commit on the Hub."))
    tokenizer_name: str | None = field(
        default=None, metadata=_help("Folder or Hub id of the tokenizer, if not the model's.")
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32", metadata=_help("Type of the weights; for mixed precision leave float32 and set bf16=true.")
    )
    attn_implementation: str | None = field(
        default=None, metadata=_help("sdpa, flash_attention_2, flex_attention, eager, ...")
    )
    experts_implementation: str | None = field(default=None, metadata=_help("grouped_mm, batched_mm, eager, ..."))
    router_dtype: Literal["float32", "model"] | None = field(
        default=None,
        metadata=_help("Type of routers and what they compute: float32 for upcycled models, or that of the model."),
    )
    router_aux_loss_coef: float | None = field(
        default=None, metadata=_help("Weight of the load-balancing loss, if not the model's.")
    )
    router_z_loss_coef: float | None = field(
        default=None, metadata=_help("Weight of the router z-loss, if not the model's.")
    )
    router_entropy_loss_coef: float | None = field(
        default=None, metadata=_help("Weight of the routing entropy, if not the model's.")
    )
    router_locality_loss_coef: float | None = field(
        default=None, metadata=_help("Weight of the locality loss, if not the model's.")
    )
    expert_nodes: list[int] | None = field(
        default=None, metadata=_help("Node of each expert for the locality loss, if not as the model says.")
    )
    router_bias_update_rate: float | None = field(
        default=None, metadata=_help("How far a step moves the selection biases, if not as the model says.")
    )
    router_jitter_noise: float | None = field(
        default=None, metadata=_help("Noise on the router's input, if not the model's.")
    )


@dataclass
class ModelArguments(CheckpointArguments):
    """Which model is trained, and what of its configuration changes."""

    loss_chunk_tokens: int | None = field(
        default=None,
        metadata=_help("Tokens whose logits are held at a time: 1024 for upcycled models; 0 holds those of all."),
    )


@dataclass
class DataArguments:
    """Text to train on and to measure."""

    train_data: list[str] = field(
        default_factory=list, metadata=_help("Files (parquet, jsonl, txt), folders, globs, Hub datasets.")
    )
    eval_data: list[str] = field(default_factory=list, metadata=_help("The same, for the perplexity of each domain."))
    train_split: str = field(default="train", metadata=_help("Split of a Hub dataset or of a folder's files."))
    eval_split: str = field(default="validation", metadata=_help("The same, for eval_data."))
    text_column: str = field(default="text", metadata=_help("Column that holds the text."))
    block_size: int = field(default=4096, metadata=_help("Tokens in a training sequence; documents are packed."))
    document_mask: bool = field(
        default=True, metadata=_help("Tokens attend to their own document only, and predict no token of the next.")
    )
    domain_weights: dict[str, float] | None = field(
        default=None, metadata=_help("Shares of the tokens of each domain, as {math: 2, code: 1}; 0 leaves one out.")
    )
    streaming: bool = field(
        default=True, metadata=_help("Read text as it comes; false tokenizes all of it once, into the cache.")
    )
    shuffle_documents: bool | None = field(
        default=None,
        metadata=_help("With streaming=false: in an order by seed, another in each pass; by default true."),
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata=_help("With streaming=false: processes to tokenize in; by default one with threads.")
    )
    max_eval_blocks: int | None = field(default=64, metadata=_help("Blocks of each domain to evaluate; null for all."))


@dataclass
class RecipeArguments:
    """What this recipe adds to Transformers' TrainingArguments, or sets otherwise than they do."""

    output_dir: str | None = field(default=None, metadata=_help("Folder for checkpoints, logs and the final model."))
    max_steps: int = field(
        default=-1, metadata=_help("Optimizer steps; required, as streamed text has no known length.")
    )
    tokens_per_step: int | None = field(
        default=None, metadata=_help("Tokens in the global batch; sets gradient_accumulation_steps.")
    )
    expected_processes: int | None = field(
        default=None, metadata=_help("Fail if another number of processes was started.")
    )
    learning_rate: float = field(default=2e-4, metadata=_help("Peak learning rate."))
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata=_help("With the steps below, or any of Transformers'.")
    )
    warmup_steps: float = field(default=0.01, metadata=_help("Steps of linear warm-up; below 1 a share of max_steps."))
    lr_decay_points: list[float] | None = field(
        default=None,
        metadata=_help(
            "Shares of max_steps at which the learning rate steps down: [0.8, 0.9], or none for other schedules."
        ),
    )
    lr_decay_factor: float = field(default=0.316, metadata=_help("What it is multiplied by at each of them."))
    router_learning_rate: float | None = field(
        default=None, metadata=_help("Peak learning rate of the routers, if not learning_rate.")
    )
    router_warmup_steps: int = field(
        default=0, metadata=_help("First steps that train the routers only; the rest is held, and warms up then.")
    )
    adam_beta1: float = field(default=0.9, metadata=_help("AdamW's beta1."))
    adam_beta2: float = field(default=0.95, metadata=_help("AdamW's beta2."))
    weight_decay: float = field(default=0.1, metadata=_help("Weight decay, on all weights but biases and norms."))
    max_grad_norm: float = field(default=1.0, metadata=_help("Clipping of the gradient's norm."))
    max_skipped_steps: int = field(
        default=10,
        metadata=_help("Steps in a row that may lack a finite gradient; each is left out, one more fails."),
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata=_help("Hide micro-batches without a finite loss from the log; waits for each of them.")
    )
    per_device_train_batch_size: int = field(default=1, metadata=_help("Blocks in a process's micro-batch."))
    per_device_eval_batch_size: int = field(default=1, metadata=_help("The same, in evaluation."))
    logging_steps: float = field(default=10, metadata=_help("Steps from one log to the next."))
    eval_strategy: str | None = field(
        default=None, metadata=_help("steps, no, ...; by default steps where there are eval_data and eval_steps.")
    )
    report_to: str | list[str] | None = field(
        default=None, metadata=_help("tensorboard, wandb, ... or none; by default tensorboard where it is installed.")
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata=_help("Every parameter takes part in every step.")
    )
    hub_strategy: str = field(
        default="end", metadata=_help("What push_to_hub=true uploads: the final model, and never anything else.")
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata=_help(
            "A checkpoint folder; last: the newest in output_dir; auto: the same, or a fresh start without one."
        ),
    )


@dataclass
class EngineArguments:
    """How processes share the model, beyond what the configuration of `accelerate launch` says."""

    tensor_parallel_size: int = field(
        default=1, metadata=_help("Processes that share each weight and a batch; others shard what is left (FSDP2).")
    )
    expert_parallel_size: int = field(
        default=1, metadata=_help("Processes that share the experts, a multiple of tensor_parallel_size.")
    )


@dataclass
class MonitoringArguments:
    """What a run shows of itself beyond its log."""

    router_probe_tokens: int = field(
        default=2048, metadata=_help("Tokens of a fixed text whose experts are compared over the run; 0 for none.")
    )
    router_probe_steps: int | None = field(
        default=None,
        metadata=_help(
            "Steps between these comparisons and pictures of the loads; 10 x logging_steps by default, 0 for neither."
        ),
    )
    router_collapse_threshold: float = field(
        default=0.3,
        metadata=_help("Warn of layers that use their experts less evenly: 1 alike, 0 the same for all; 0 never."),
    )
    peak_flops_per_device: float | None = field(
        default=None, metadata=_help("FLOP/s that a device can do at best, for mfu, if the GPU is not a known one.")
    )


class Arguments(NamedTuple):
    """All settings of a run.

    `given` holds those that were given, and those whose default follows from others or from what is installed;
    `notes` are lines that tell of the latter.
    """

    model: ModelArguments
    data: DataArguments
    training: "UpcyclingTrainingArguments"
    given: dict[str, Any]
    notes: list[str]


GROUPS = (ModelArguments, DataArguments, RecipeArguments, EngineArguments, MonitoringArguments)

USAGE = """\
usage: accelerate launch train/train.py --config FILE.yaml [key=value | --key value | --key=value | --flag]...

Trains a MoE or dense checkpoint on streamed text. What is given later wins: defaults, --config, command line.
"""


def format_help() -> str:
    """Return the text of `--help`."""
    ending = "Every other field of transformers.TrainingArguments is a setting too, such as bf16 or save_steps."
    return help_text(USAGE, GROUPS, ending)


def help_text(usage: str, groups: Sequence[type], ending: str) -> str:
    """Return a text of `--help`: `usage`, what the settings of `groups` are, and `ending`."""
    lines = [usage]
    for group in groups:
        lines.append(group.__doc__)
        for setting in fields(group):
            default = setting.default_factory() if setting.default is MISSING else setting.default
            shown = "" if default in (None, []) else f" [{default}]"
            lines.append(f"  {setting.name:<28} {setting.metadata['help']}{shown}")
        lines.append("")
    lines.append(ending)
    return "\n".join(lines)


_OVERRIDE = re.compile(r"[A-Za-z_]\w*=")


def parse_command_line(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the files given by `--config`, and the settings given by `key=value` and by flags.

    A flag takes all values up to the next flag or `key=value`, so that a shell may expand a glob; without any it is
    true.

    Raises:
        SettingsError: if an argument is none of these, or is given twice.
    """
    configs: list[str] = []
    settings: dict[str, Any] = {}
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--"):
            key, value = parse_override(argument)
        elif "=" in argument:
            name, _, text = argument[2:].partition("=")
            key, value = parse_override(f"{name.replace('-', '_')}={text}")
        else:
            key, values = argument[2:].replace("-", "_"), []
            while remaining and not remaining[0].startswith("--") and not _OVERRIDE.match(remaining[0]):
                values.append(parse_override(f"value={remaining.pop(0)}")[1])
            value = True if not values else values[0] if len(values) == 1 else values
        if key == "config":
            if not isinstance(value, str):
                raise SettingsError(f"--config: expected one file, got {value!r}.")
            configs.append(value)
        elif key in settings:
            raise SettingsError(f"{key} is given twice on the command line.")
        else:
            settings[key] = value
    return configs, settings


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Return the settings of the command line `argv`, checked.

    Raises:
        SettingsError: at the first setting that is unknown, of the wrong type, missing, or impossible.
    """
    return build_arguments(parse_settings(argv))


def parse_settings(argv: Sequence[str]) -> dict[str, Any]:
    """Return what the command line `argv` and the files that it names set, by known names and of the right types.

    Raises:
        SettingsError: at the first setting that is unknown or of the wrong type.
    """
    return read_settings(argv, _setting_types())


def read_settings(argv: Sequence[str], types: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the command line `argv` and the files that it names set, of the settings that have `types`.

    Raises:
        SettingsError: at the first setting that is unknown or of the wrong type.
    """
    configs, overrides = parse_command_line(argv)
    settings: dict[str, Any] = {}
    for where, given in [*((path, load_yaml(path)) for path in configs), ("command line", overrides)]:
        check_keys(given, types, where)
        settings.update(given)
    return {name: _checked(name, value, types[name]) for name, value in settings.items()}


def _setting_types() -> dict[str, Any]:
    from .training_arguments import UpcyclingTrainingArguments

    return setting_types((ModelArguments, DataArguments, UpcyclingTrainingArguments))


def setting_types(groups: Sequence[type]) -> dict[str, Any]:
    """Return the type of each setting of `groups`."""
    names = {setting.name for group in groups for setting in fields(group) if setting.init}
    types = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    return {name: types[name] for name in names}


def build_arguments(settings: dict[str, Any]) -> Arguments:
    """Return the arguments that `settings` give, with defaults for the rest.

    Raises:
        SettingsError: as [`parse_arguments`].
    """
    from .checks import check_least_values
    from .training_arguments import UpcyclingTrainingArguments

    groups = (ModelArguments, DataArguments, UpcyclingTrainingArguments)
    types = _setting_types()
    settings = {name: _checked(name, value, types[name]) for name, value in settings.items()}
    for name in ("model_name_or_path", "output_dir", "train_data"):
        if not settings.get(name):
            raise SettingsError(f"{name} is missing; give it in the --config file or as {name}=...")
    check_least_values(settings)
    if settings.get("max_steps", -1) < 1:
        raise SettingsError("max_steps is missing; streamed text has no known length, so say how many steps to train.")
    notes = [*_settle_evaluation(settings), *_settle_reports(settings)]
    return Arguments(*build_groups(groups, settings), given=settings, notes=notes)


def _settle_evaluation(settings: dict[str, Any]) -> list[str]:
    """Set the `eval_strategy` that follows from the other settings, and return what is worth telling of it.

    Raises:
        SettingsError: if evaluation is asked for without text for it.
    """
    if settings.get("eval_data"):
        if settings.get("eval_strategy") is None:
            settings["eval_strategy"] = "steps" if settings.get("eval_steps") is not None else "no"
        return []
    asking = [name for name in ("eval_strategy", "eval_on_start") if settings.get(name) not in (None, "no", False)]
    if asking:
        raise SettingsError(
            f"{asking[0]}={settings[asking[0]]} asks for evaluation, but eval_data is missing; give it, or leave "
            f"{asking[0]} out."
        )
    settings["eval_strategy"] = "no"
    return ["eval_data is not given; nothing is evaluated."] if settings.get("eval_steps") is not None else []


def _settle_reports(settings: dict[str, Any]) -> list[str]:
    """Set the default of `report_to`, and return what is worth telling of it.

    Raises:
        SettingsError: if TensorBoard is asked for and not installed.
    """
    is_installed = importlib.util.find_spec("tensorboard") is not None
    install = "pip install 'upcycled-moe[tensorboard]'"
    if settings.get("report_to") is None:
        settings["report_to"] = "tensorboard" if is_installed else "none"
        return [] if is_installed else [f"TensorBoard is not installed, so report_to=none; {install}."]
    reports = settings["report_to"]
    if not is_installed and "tensorboard" in ([reports] if isinstance(reports, str) else reports):
        raise SettingsError(
            f"report_to={reports!r}, but TensorBoard is not installed: {install}, or set report_to=none."
        )
    # YAML reads a bare `no` as false.
    settings["report_to"] = "none" if reports == "no" else reports
    return []


def build_groups(groups: Sequence[type], settings: Mapping[str, Any]) -> list[Any]:
    """Return the groups of arguments that `settings` give, with defaults for those left out.

    Raises:
        SettingsError: where a check of theirs fails.
    """
    try:
        return [build_group(group, settings) for group in groups]
    # Checks of Transformers and trl raise these; to whoever wrote the settings they are all the same.
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise SettingsError(" ".join(str(error).split())) from error


def build_group(group: type, settings: Mapping[str, Any]) -> Any:
    """Return the group of arguments that `settings` give, with defaults for those left out."""
    names = {setting.name for setting in fields(group)}
    return group(**{name: value for name, value in settings.items() if name in names})


def _checked(name: str, value: Any, expected: Any) -> Any:
    """Return `value` as a field of type `expected` takes it.

    Raises:
        SettingsError: if it has another type.
    """
    from huggingface_hub.dataclasses import type_validator

    allowed = get_args(expected) or (expected,)
    if type(value) is int and float in allowed:
        return float(value)
    if isinstance(value, str) and expected == list[str]:
        return [value]
    if isinstance(value, list) and list[float] in (expected, *allowed):
        return [_checked(name, item, float) for item in value]
    if isinstance(value, dict) and dict[str, float] in allowed:
        return {key: _checked(f"{name}.{key}", weight, float) for key, weight in value.items()}
    # YAML reads the `no` of save_strategy=no, report_to=no and the like as false.
    if value is False and str in allowed and bool not in allowed:
        return "no"
    try:
        if isinstance(value, bool) and bool not in allowed and Any not in allowed:
            raise TypeError
        type_validator(name, value, expected)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{name}={value!r} has the wrong type; expected {_describe(expected)}.") from error
    return value


def _describe(expected: Any) -> str:
    if getattr(expected, "__origin__", None) is Literal:
        return f"one of {', '.join(map(repr, get_args(expected)))}"
    if "|" in str(expected) or "Union" in str(expected):
        return " or ".join("null" if part is NoneType else _describe(part) for part in get_args(expected))
    return expected.__name__ if isinstance(expected, type) and not get_args(expected) else str(expected)


# Fields of Transformers' own that decide a result, or what is kept of it; another version may have other defaults.
DECIDING_FIELDS = (
    "seed",
    "full_determinism",
    "optim",
    "adam_epsilon",
    "gradient_accumulation_steps",
    "average_tokens_across_devices",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "tf32",
    "torch_compile",
    "use_liger_kernel",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "save_only_model",
    "load_best_model_at_end",
)


def resolved_settings(arguments: Arguments) -> dict[str, Any]:
    """Return the settings of a run, with the defaults spelt out, as a file that `--config` takes.

    Those that belong to one start only, or are secret, are left out.
    """
    values = {name: getattr(arguments.training, name) for name in DECIDING_FIELDS}
    if arguments.training.tokens_per_step is not None:
        # It sets this, and both together are refused.
        del values["gradient_accumulation_steps"]
    settings: dict[str, Any] = {name: getattr(value, "value", value) for name, value in values.items()}
    for group in GROUPS:
        settings |= asdict(build_group(group, arguments.given))
    settings |= arguments.given
    return {name: value for name, value in settings.items() if name not in ("resume_from_checkpoint", "hub_token")}
