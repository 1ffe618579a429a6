"""Scores that a reward model gives to conversations."""

from collections.abc import Sequence

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import modeling_upcycled_moe  # noqa: F401 (registers the classes, so that no remote code is run)

from ..common.devices import best_device
from ..common.progress import Progress
from ..common.settings import SettingsError
from .template import Messages, conversation_ids, set_chat_template, set_padding


def load_reward_model(
    name: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the reward model `name`, dense or MoE, in evaluation mode, and its tokenizer, which pads as it does.

    Args:
        name: folder or Hub id.
        dtype: of the weights; `auto` is that of the checkpoint.
        device: the accelerator if there is one by default.
        chat_template: a file, or `chatml`; by default the tokenizer's own.
        trust_remote_code: run code beside the weights; the package's own classes need none.

    Raises:
        SettingsError: if it cannot be loaded, gives no single score, or has no chat template.
    """
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    config, tokenizer = open_reward_model(name, revision, chat_template, trust_remote_code)
    # What Transformers raises for missing or impossible weights.
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, config=config, dtype=dtype, **source)
    except (OSError, ValueError, ImportError) as error:
        raise SettingsError(f"{name}: {' '.join(str(error).split())}") from error
    if config.pad_token_id is None:
        set_padding(tokenizer, model, name)
    else:
        # What it was trained with decides which token it scores.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    return model.to(device or best_device()).eval(), tokenizer


def open_reward_model(
    name: str, revision: str | None = None, chat_template: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Return the configuration and the tokenizer of the reward model `name`, without its weights.

    Raises:
        SettingsError: if they cannot be loaded, it gives no single score, or has no chat template.
    """
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    # What Transformers raises for a missing or impossible checkpoint, configuration or class.
    try:
        config = AutoConfig.from_pretrained(name, **source)
        check_gives_one_score(config, name)
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        set_chat_template(tokenizer, chat_template, name)
    except SettingsError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise SettingsError(f"{name}: {' '.join(str(error).split())}") from error
    return config, tokenizer


def check_gives_one_score(config: PreTrainedConfig, name: str) -> None:
    """Check that a checkpoint's configuration is that of a reward model.

    Raises:
        SettingsError: if it is not.
    """
    [architecture, *_] = config.architectures or ["no architecture"]
    if not architecture.endswith("ForSequenceClassification"):
        raise SettingsError(
            f"{name}: its configuration names {architecture}, but a reward model is a …ForSequenceClassification with "
            "num_labels=1; train one from it with train/reward.py."
        )
    if config.num_labels != 1:
        raise SettingsError(
            f"{name}: a classifier with num_labels={config.num_labels}, but a reward model has num_labels=1."
        )


def score_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    batch_size: int = 16,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Return the score of each conversation, in their order.

    Conversations of about one length are scored together, padded on the right.

    Args:
        model: as [`load_reward_model`] returns it, or as `set_padding` leaves it.
        max_length: tokens of a conversation; a longer one loses its beginning. The model's positions by default.
        progress: it is warned of conversations that are cut.

    Raises:
        SettingsError: if the chat template refuses one.
    """
    progress = progress or Progress()
    max_length = max_length or model.config.max_position_embeddings
    sequences = [conversation_ids(tokenizer, conversation) for conversation in conversations]
    if num_cut := sum(len(tokens) > max_length for tokens in sequences):
        progress.warn(
            f"{num_cut:,} of {len(sequences):,} conversations are longer than max_length={max_length} tokens; they "
            "are scored without their beginning."
        )
    sequences = [tokens[-max_length:] for tokens in sequences]
    scores = [0.0] * len(sequences)
    was_training = model.training
    model.eval()
    with progress.task("Scoring", len(sequences), "conversations") as advance:
        for batch in batches_by_length(sequences, batch_size):
            for index, score in zip(batch, score_batch(model, [sequences[index] for index in batch]), strict=True):
                scores[index] = score
            advance(len(batch))
    model.train(was_training)
    return scores


def batches_by_length(sequences: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Return the indices of `sequences` in batches of about one length, which need little padding."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


@torch.inference_mode()
def score_batch(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Return the scores of `sequences` of tokens, padded on the right, by `model` in the mode it is in."""
    length = max(map(len, sequences))
    input_ids = torch.full((len(sequences), length), model.config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, tokens in enumerate(sequences):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        attention_mask[row, : len(tokens)] = 1
    device = model.device
    outputs = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
    return outputs.logits[:, 0].float().tolist()
