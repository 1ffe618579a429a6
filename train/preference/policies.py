"""Policies of the rounds: loading them with a tokenizer that can render conversations, and where they come from."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_upcycled_moe  # noqa: F401 (registers the classes, so that no remote code is run)

from ...common.settings import SettingsError
from .dpo_arguments import PolicyArguments


CONFIG_FIELDS = ("router_aux_loss_coef", "router_z_loss_coef")


def load_policy(
    folder: Path, policy: PolicyArguments, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """Return the policy in `folder`, in evaluation mode, with the configuration that `policy` asks for.

    Raises:
        SettingsError: if it cannot be loaded, lacks a loss that is weighted, or has fewer tokens than `tokenizer`.
    """
    config = _config(folder, policy)
    if len(tokenizer) > config.vocab_size:
        raise SettingsError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model has vocab_size={config.vocab_size}."
        )
    implementations = {
        name: getattr(policy, name)
        for name in ("attn_implementation", "experts_implementation")
        if getattr(policy, name) is not None
    }
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=policy.dtype, trust_remote_code=False, **implementations
        )
    except (OSError, ValueError, ImportError) as error:
        raise SettingsError(f"{folder}: {' '.join(str(error).split())}") from error
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Where the token that pads has other uses too, it is to be learned.
    model.get_input_embeddings().padding_idx = None
    return model.to(device).eval()


def _config(folder: Path, policy: PolicyArguments):
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SettingsError(f"model_name_or_path={folder}: {' '.join(str(error).split())}") from error
    for name in CONFIG_FIELDS:
        if (value := getattr(policy, name)) is None:
            continue
        if not hasattr(config, name):
            raise SettingsError(
                f"{name}={value}, but {folder} is a {config.model_type} model without it; leave it out."
            )
        setattr(config, name, value)
    return config


def load_tokenizer(folder: Path, policy: PolicyArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `folder` with a chat template and a token to pad with.

    Raises:
        SettingsError: if it has none of either.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder}: no tokenizer can be loaded ({' '.join(str(error).split())}).") from error
    if policy.chat_template is not None:
        try:
            tokenizer.chat_template = Path(policy.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"chat_template={policy.chat_template}: cannot be read ({error}).") from error
    if tokenizer.chat_template is None:
        raise SettingsError(f"{folder}: its tokenizer has no chat template; give chat_template=FILE.")
    return tokenizer
