"""Policies of the rounds: loading them, and a tokenizer that can render conversations for them."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ...common.settings import SettingsError
from ...preference.template import set_chat_template
from ..model import check_sizes, chosen_implementations, load, load_config
from ..model import load_tokenizer as load_own_tokenizer
from .dpo_arguments import PolicyArguments


def check_policy(folder: Path, policy: PolicyArguments, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Check what can be checked of the policy in `folder` before it is loaded.

    Raises:
        SettingsError: if it is no language model, lacks what is set, has fewer tokens than `tokenizer`, or fewer
            positions than `max_length`.
    """
    config = load_config(_in(folder, policy))
    name = policy.model_name_or_path
    architectures = config.architectures or []
    if not any(architecture.endswith("ForCausalLM") for architecture in architectures):
        raise SettingsError(
            f"model_name_or_path={name}: is no language model ({', '.join(architectures) or 'architectures missing'} "
            "in config.json); give one."
        )
    check_sizes(config, tokenizer, name, "max_length", max_length)


def load_policy(folder: Path, policy: PolicyArguments, device: torch.device) -> PreTrainedModel:
    """Return the policy in `folder`, in evaluation mode, with the configuration that `policy` asks for.

    Raises:
        SettingsError: if it cannot be loaded, or lacks what is set.
    """
    policy = _in(folder, policy)
    config = load_config(policy)
    model = load(
        "model_name_or_path",
        str(folder),
        AutoModelForCausalLM.from_pretrained,
        config=config,
        dtype=policy.dtype,
        trust_remote_code=False,
        **chosen_implementations(policy),
    )
    # The token that pads may stand in a text too, and is to be learned there.
    model.get_input_embeddings().padding_idx = None
    return model.to(device).eval()


def load_tokenizer(folder: Path, policy: PolicyArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `folder`, or the one that `policy` names, with a chat template and a token that pads.

    Padding is masked, and so may be done with a token that has other uses.

    Raises:
        SettingsError: if there is none of these.
    """
    tokenizer = load_own_tokenizer(_in(folder, policy))
    set_chat_template(tokenizer, policy.chat_template, policy.model_name_or_path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise SettingsError(f"{folder}: its tokenizer has no token to pad with, nor one that ends a text; add one.")
    return tokenizer


def _in(folder: Path, policy: PolicyArguments) -> PolicyArguments:
    return replace(policy, model_name_or_path=str(folder), model_revision=None)
