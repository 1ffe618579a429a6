"""Loading the model that becomes a reward model."""

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import modeling_upcycled_moe  # noqa: F401 (registers the classes, so that no remote code is run)

from ...common.settings import SettingsError
from ...preference.scoring import check_gives_one_score
from ...preference.template import set_chat_template, set_padding
from ..model import check_sizes, chosen_implementations, load, load_config, load_tokenizer
from .reward_arguments import RewardModelArguments


HEAD = "score.weight"


def load_reward_start(
    model_args: RewardModelArguments, max_length: int, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model to train, and its tokenizer, which pads with a token that no conversation ends with.

    A reward model is taken as it is. A language model loses its head, and gets one for a score, drawn from
    N(0, `initializer_range`²) by `seed`. The head computes in float32.

    Raises:
        SettingsError: if it cannot be loaded, is neither, has fewer tokens than the tokenizer or fewer positions than
            `max_length`, or its tokenizer has no chat template.
    """
    name = model_args.model_name_or_path
    config = load_config(model_args)
    is_new = _has_no_head(config, name)
    if is_new:
        config.num_labels = 1
    tokenizer = load_tokenizer(model_args)
    set_chat_template(tokenizer, model_args.chat_template, name)
    check_sizes(config, tokenizer, name, "max_length", max_length)
    verbosity = logging.get_verbosity()
    # The report of heads that come and go.
    logging.set_verbosity_error()
    try:
        model, report = load(
            "model_name_or_path",
            name,
            AutoModelForSequenceClassification.from_pretrained,
            config=config,
            revision=model_args.model_revision,
            trust_remote_code=False,
            dtype=model_args.dtype,
            output_loading_info=True,
            **chosen_implementations(model_args),
        )
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(set(report["missing_keys"]) - ({HEAD} if is_new else set())):
        raise SettingsError(f"{name}: its weights lack {', '.join(missing[:3])}; it is damaged, or of another model.")
    if is_new:
        generator = torch.Generator().manual_seed(seed)
        head = torch.randn(model.score.weight.shape, generator=generator) * config.initializer_range
        model.score.weight.data.copy_(head)
    set_padding(tokenizer, model, name)
    score_in_float32(model)
    return model, tokenizer


def _has_no_head(config: PreTrainedConfig, name: str) -> bool:
    [architecture, *_] = config.architectures or [""]
    if architecture.endswith("ForCausalLM"):
        return True
    check_gives_one_score(config, name)
    return False


def score_in_float32(model: PreTrainedModel) -> None:
    """Have the head of `model` compute in float32 under autocast, which would round scores to 8 bits."""
    model.score.register_forward_hook(_in_float32)


def _in_float32(head: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    [hidden_states] = args
    device = hidden_states.device.type
    if not torch.is_autocast_enabled(device):
        return output
    with torch.autocast(device, enabled=False):
        return nn.functional.linear(hidden_states.float(), head.weight.float())
