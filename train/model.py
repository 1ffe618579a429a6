"""Loading what is trained."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.utils import strtobool

import modeling_upcycled_moe  # noqa: F401 (registers the classes, so that no remote code is run)

from ..common.settings import SettingsError
from ..model_cards.card import CARD_FILE
from .arguments import CheckpointArguments, ModelArguments


# What the checkpoint to start from says of its origin and terms.
CARRIED_FILES = ("upcycling.json", "LICENSE*", "NOTICE*")
CONFIG_FIELDS = (
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_entropy_loss_coef",
    "router_locality_loss_coef",
    "router_bias_update_rate",
    "router_jitter_noise",
    "expert_nodes",
)
# Logits of 1024 tokens fill a GPU, and take 1.2 GB with 150,000 words, in float32 and bfloat16.
LOSS_CHUNK_TOKENS = 1024


def load_tokenizer(model_args: CheckpointArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the checkpoint, or that of `tokenizer_name`.

    Raises:
        SettingsError: if there is none.
    """
    if model_args.tokenizer_name is not None:
        return load("tokenizer_name", model_args.tokenizer_name, AutoTokenizer.from_pretrained)
    return load(
        "model_name_or_path",
        model_args.model_name_or_path,
        AutoTokenizer.from_pretrained,
        revision=model_args.model_revision,
    )


def load_model(
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    distributed_config: DistributedConfig | None = None,
    weights: str | None = None,
) -> PreTrainedModel:
    """Return the checkpoint's model, with the configuration that `model_args` asks for.

    Args:
        distributed_config: How to shard the model as it is loaded; not at all by default.
        weights: Checkpoint of a run to take the weights from. Its configuration may have been fitted to the tokenizer
            since the start, which would freeze the embedding of a token that pads.
    Raises:
        SettingsError: if it cannot be loaded, has no such configuration or loss, fewer tokens than
            `tokenizer`, or fewer positions than `block_size`.
    """
    name = model_args.model_name_or_path
    source = {"revision": model_args.model_revision, "trust_remote_code": False}
    config = load_config(model_args)
    check_sizes(config, tokenizer, name, "block_size", block_size)
    model = load(
        "model_name_or_path",
        weights or name,
        AutoModelForCausalLM.from_pretrained,
        config=config,
        dtype=model_args.dtype,
        distributed_config=distributed_config,
        **source,
        **chosen_implementations(model_args),
    )
    # Packed blocks have no padding, and Qwen's tokenizers pad with the end-of-text token, which is to be learned.
    model.get_input_embeddings().padding_idx = None
    _set_loss_chunk_tokens(model, model_args.loss_chunk_tokens)
    _check_types_can_be_sharded(model, distributed_config)
    _check_noise_can_be_recomputed(model.config)
    return model


def load_config(model_args: CheckpointArguments) -> PreTrainedConfig:
    """Return the checkpoint's configuration, changed as `model_args` ask.

    Raises:
        SettingsError: if it cannot be loaded, or has no such field.
    """
    name = model_args.model_name_or_path
    source = {"revision": model_args.model_revision, "trust_remote_code": False}
    config = load("model_name_or_path", name, AutoConfig.from_pretrained, **source)
    for field in CONFIG_FIELDS:
        if (value := getattr(model_args, field)) is None:
            continue
        if not hasattr(config, field):
            raise SettingsError(
                f"{field}={value}, but {name} is a {config.model_type} model without it; leave it out."
            )
        setattr(config, field, value)
    _set_router_dtype(config, model_args)
    return config


def check_sizes(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str, setting: str, length: int
) -> None:
    """Check that a model with `config` has all tokens of `tokenizer`, and `length` positions.

    Args:
        name: of the checkpoint, for errors.
        setting: that gives the length.

    Raises:
        SettingsError: if not.
    """
    if len(tokenizer) > config.vocab_size:
        raise SettingsError(
            f"The tokenizer has {len(tokenizer)} tokens, but {name} has vocab_size={config.vocab_size}; "
            "give the model's own as tokenizer_name."
        )
    # Scaled rotary embeddings reach further than what the model was trained on.
    num_positions = config.max_position_embeddings * (
        (getattr(config, "rope_parameters", None) or {}).get("factor") or 1
    )
    if length > num_positions:
        raise SettingsError(
            f"{setting}={length} exceeds max_position_embeddings={config.max_position_embeddings} of {name}; lower it."
        )


def chosen_implementations(model_args: CheckpointArguments) -> dict[str, str]:
    """Return which attention and experts `model_args` ask for."""
    return {
        field: getattr(model_args, field)
        for field in ("attn_implementation", "experts_implementation")
        if getattr(model_args, field) is not None
    }


def _set_router_dtype(config: PreTrainedConfig, model_args: CheckpointArguments) -> None:
    if hasattr(config, "router_dtype"):
        config.router_dtype = None if model_args.router_dtype == "model" else "float32"
    elif model_args.router_dtype == "float32":
        raise SettingsError(
            f"router_dtype=float32, but {model_args.model_name_or_path} is a {config.model_type} model without it; "
            "leave it out."
        )


def _check_noise_can_be_recomputed(config: PreTrainedConfig) -> None:
    """Refuse noise where Accelerate checkpoints activations: it computes them again with other noise."""
    is_checkpointed = all(
        strtobool(os.environ.get(name, "false")) for name in ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING")
    )
    noises = {name: getattr(config, name, 0) for name in ("router_jitter_noise", "attention_dropout")}
    for name, value in noises.items():
        if is_checkpointed and value:
            raise SettingsError(
                f"{name}={value}, but with fsdp_activation_checkpointing gradients would be of other noise; set that "
                "to false in the accelerate configuration, and gradient_checkpointing=true here."
            )


def _check_types_can_be_sharded(model: PreTrainedModel, distributed_config: DistributedConfig | None) -> None:
    """Refuse float32 routers in a model of another type where FSDP2 shards both together."""
    if distributed_config is not None:
        is_sharded = distributed_config.fsdp_size > 1
    else:
        # With mixed precision Accelerate converts all weights to float32 first.
        has_mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
        is_sharded = strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")) and not has_mixed_precision
    if is_sharded and len({parameter.dtype for parameter in model.parameters()}) > 1:
        dtype = str(model.dtype).removeprefix("torch.")
        raise SettingsError(
            f"dtype={dtype} with routers in float32 cannot be sharded by FSDP2, which takes weights of one type only; "
            "set dtype=float32 with bf16=true, or router_dtype=model."
        )


def _set_loss_chunk_tokens(model: PreTrainedModel, num_tokens: int | None) -> None:
    if num_tokens is not None and num_tokens < 0:
        raise SettingsError(f"loss_chunk_tokens={num_tokens} is negative; 0 holds the logits of all tokens.")
    if hasattr(model, "loss_chunk_tokens"):
        model.loss_chunk_tokens = LOSS_CHUNK_TOKENS if num_tokens is None else num_tokens
    elif num_tokens:
        raise SettingsError(
            f"loss_chunk_tokens={num_tokens}, but {model.config.model_type} models know no such loss; leave it out, "
            "or set use_liger_kernel=true on a GPU."
        )


def load(setting: str, name: str, load_from: Callable[..., Any], **options: Any) -> Any:
    """Return what `load_from` makes of the checkpoint `name`.

    Raises:
        SettingsError: if it cannot; the message names the `setting` that gave the checkpoint.
    """
    try:
        return load_from(name, **options)
    except StrictDataclassError as error:
        raise SettingsError(f"{setting}={name}: {error.__cause__ or error}") from error
    # What Transformers raises for a missing or impossible checkpoint, configuration or implementation.
    except (OSError, ValueError, ImportError) as error:
        raise SettingsError(f"{setting}={name}: {' '.join(str(error).split())}") from error


def risks_of(config: Any) -> list[str]:
    """Return what in a model's configuration will keep it from learning as one would expect."""
    stock = getattr(config, "num_experts_per_tok", None) == 1 and getattr(config, "norm_topk_prob", False)
    if getattr(config, "has_constant_weights", stock):
        return [
            "norm_topk_prob=true with one expert a token, or one in each group of prototype_top_k: its weight never "
            "changes, so that the language-modeling loss gives the router no gradient; use two, or "
            "norm_topk_prob=false."
        ]
    return []


def carry_files(model_args: CheckpointArguments, output_dir: str) -> Path:
    """Copy origin and licence of the checkpoint to start from into `output_dir`; return its folder, with its card."""
    source = Path(model_args.model_name_or_path)
    if not source.is_dir():
        wanted = [*CARRIED_FILES, CARD_FILE]
        source = Path(snapshot_download(str(source), revision=model_args.model_revision, allow_patterns=wanted))
    for pattern in CARRIED_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.parent.resolve() != Path(output_dir).resolve():
                shutil.copyfile(file, Path(output_dir, file.name))
    return source
