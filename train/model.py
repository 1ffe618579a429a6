"""Loading what is trained."""

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_upcycled_moe  # noqa: F401 (registers the classes, so that no remote code is run)

from ..common.settings import SettingsError
from .arguments import ModelArguments


CONFIG_FIELDS = ("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise")


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the checkpoint, or that of `tokenizer_name`.

    Raises:
        SettingsError: if there is none.
    """
    if model_args.tokenizer_name is not None:
        return _load("tokenizer_name", model_args.tokenizer_name, AutoTokenizer.from_pretrained)
    return _load(
        "model_name_or_path",
        model_args.model_name_or_path,
        AutoTokenizer.from_pretrained,
        revision=model_args.model_revision,
    )


def load_model(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the checkpoint's model, with the configuration that `model_args` asks for.

    Raises:
        SettingsError: if it cannot be loaded, has no such configuration, or fewer tokens than `tokenizer`.
    """
    name = model_args.model_name_or_path
    source = {"revision": model_args.model_revision, "trust_remote_code": False}
    config = _load("model_name_or_path", name, AutoConfig.from_pretrained, **source)
    for field in CONFIG_FIELDS:
        if (value := getattr(model_args, field)) is None:
            continue
        if not hasattr(config, field):
            raise SettingsError(
                f"{field}={value}, but {name} is a {config.model_type} model without it; leave it out."
            )
        setattr(config, field, value)
    if len(tokenizer) > config.vocab_size:
        raise SettingsError(
            f"The tokenizer has {len(tokenizer)} tokens, but {name} has vocab_size={config.vocab_size}; "
            "give the model's own as tokenizer_name."
        )
    implementations = {
        field: getattr(model_args, field)
        for field in ("attn_implementation", "experts_implementation")
        if getattr(model_args, field) is not None
    }
    return _load(
        "model_name_or_path",
        name,
        AutoModelForCausalLM.from_pretrained,
        config=config,
        dtype=model_args.dtype,
        **source,
        **implementations,
    )


def _load(setting: str, name: str, load: Callable[..., Any], **options: Any) -> Any:
    try:
        return load(name, **options)
    # What Transformers raises for a missing or impossible checkpoint, configuration or implementation.
    except (OSError, ValueError, ImportError) as error:
        raise SettingsError(f"{setting}={name}: {' '.join(str(error).split())}") from error
