"""Conversations as tokens, and the token that pads batches of them.

A reward model scores the last token that is not padding, and Transformers' classes know padding by its token alone. A
conversation must therefore not end with that token: another one would be scored, without a word.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..common.progress import Progress
from ..common.settings import SettingsError
from ..common.text import first_line


# Qwen's format of conversations, for tokenizers without a template. Unlike Qwen's own it adds no system message.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML}

# Answers that end in other tokens: what all of them end with when rendered is the template's.
_PROBES = ("yes", "42", "Because.")

Messages = Sequence[Mapping[str, str]]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None, name: str) -> None:
    """Give `tokenizer` the chat template `template`, a file or the name of one in `TEMPLATES`; None keeps its own.

    Args:
        name: of the checkpoint, for errors.

    Raises:
        SettingsError: if the file cannot be read, or the tokenizer ends up without a template.
    """
    if template in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[template]
    elif template is not None:
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"chat_template={template}: cannot be read ({error}); give a file, or {' or '.join(TEMPLATES)}."
            ) from error
    if tokenizer.chat_template is None:
        raise SettingsError(
            f"{name}: its tokenizer has no chat template, so conversations cannot be rendered; give "
            f"chat_template=FILE, or chat_template=chatml for Qwen's format."
        )


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False
) -> list[int]:
    """Return the tokens of a whole conversation, as the tokenizer's chat template renders it.

    Args:
        add_generation_prompt: with what an answer follows, for a conversation that has none yet.

    Raises:
        SettingsError: if the template refuses it, such as one without system messages, or renders nothing.
    """
    try:
        tokens = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
        )["input_ids"]
        problem = None if tokens else "it renders nothing"
    except (TemplateError, TypeError) as error:
        problem = first_line(error)
    if problem is not None:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise SettingsError(
            f"The chat template refuses a conversation of {roles} ({problem}); give others, or another chat_template."
        )
    return tokens


def ending_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that conversations end with: one, unless the template ends with the answer itself."""
    return {tokens[-1] for tokens in _probes(tokenizer)}


def _probes(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    answers = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}] for text in _PROBES]
    return [conversation_ids(tokenizer, answer) for answer in answers]


def set_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Have `model` and `tokenizer` pad with one token that no conversation ends with.

    That is the one that the configuration names, where it will do. Else it is the first that will of the tokenizer's
    own, the one that ends texts, and the other special tokens, and of them the first that the template does not use at
    all, if there is one: `<|endoftext|>` of Qwen's tokenizers, as ChatML ends with a line break after `<|im_end|>`.
    Its embedding stays trainable: it may stand in a text.

    Args:
        name: of the checkpoint, for errors.

    Raises:
        SettingsError: if every token there is ends conversations.
    """
    pad_id = _padding_id(tokenizer, model.config, name)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    model.config.pad_token_id = pad_id
    model.get_input_embeddings().padding_idx = None


def keep_padding(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """Have `tokenizer` pad with the token that `config` names: it says which token the model scores.

    Args:
        name: of the checkpoint, for errors.

    Raises:
        SettingsError: if it names none that the tokenizer has, or one that conversations end with.
    """
    token = None if config.pad_token_id is None else tokenizer.convert_ids_to_tokens(config.pad_token_id)
    if token is None or config.pad_token_id in ending_ids(tokenizer):
        problem = "no token of its tokenizer" if token is None else f"{token!r}, which conversations end with"
        other = _padding_id(tokenizer, config, name)
        raise SettingsError(
            f"{name}: pad_token_id={config.pad_token_id} in config.json is {problem}, so it does not say which token "
            f"a reward model scores; set it to one that no conversation ends with, such as {other} "
            f"({tokenizer.convert_ids_to_tokens(other)!r})."
        )
    tokenizer.pad_token = token


def _padding_id(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> int:
    endings = ending_ids(tokenizer)
    special = [index for index, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    candidates = [
        index
        for index in (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, *special)
        if index is not None and index not in endings and index < config.vocab_size
    ]
    if config.pad_token_id in candidates:
        return config.pad_token_id
    used = {index for tokens in _probes(tokenizer) for index in tokens}
    if candidates:
        return min(candidates, key=used.__contains__)
    shown = ", ".join(repr(tokenizer.convert_ids_to_tokens(index)) for index in sorted(endings))
    raise SettingsError(
        f"{name}: no special token is left to pad with, as conversations end with {shown}, and a reward model scores "
        "the last token that is not padding; give a chat_template that ends otherwise, such as chatml, or add a token."
    )


class TokenizedPairs(NamedTuple):
    """Pairs as tokens.

    Args:
        rows: columns `chosen_ids`, `rejected_ids` (whole conversations, as trl's RewardTrainer takes them), `source`,
            and `chosen_length` and `rejected_length`, the characters of the answers.
        num_too_long: pairs that were left out.
        numbers: which of the pairs the rows are, counted from zero.
    """

    rows: Dataset
    num_too_long: int
    numbers: tuple[int, ...]


def tokenize_pairs(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str, progress: Progress | None = None
) -> TokenizedPairs:
    """Return `pairs` of [`read_pairs`] as tokens, without those of which a conversation exceeds `max_length`.

    Args:
        tokenizer: as `set_padding` leaves it.
        name: of the pairs, for errors and warnings.
        progress: it is warned of pairs that are left out.

    Raises:
        SettingsError: if no pair is left, or a conversation ends with the token that pads.
    """
    progress = progress or Progress()
    rows, numbers = [], []
    with progress.task("Tokenizing pairs", len(pairs), "pairs") as advance:
        for number, pair in enumerate(pairs):
            row = _tokenized(pair, tokenizer, name)
            if max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length:
                rows.append(row)
                numbers.append(number)
            advance(1)
    if not rows:
        raise SettingsError(
            f"{name}: all {len(pairs):,} pairs are longer than max_length={max_length} tokens; raise it, or give "
            "shorter ones."
        )
    num_too_long = len(pairs) - len(rows)
    if num_too_long:
        progress.warn(
            f"{name}: {num_too_long:,} of {len(pairs):,} pairs are longer than max_length={max_length} tokens and are "
            "left out."
        )
    return TokenizedPairs(Dataset.from_list(rows), num_too_long, tuple(numbers))


def _tokenized(pair: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    row = {"source": pair["source"]}
    for side in ("chosen", "rejected"):
        tokens = conversation_ids(tokenizer, pair["prompt"] + pair[side])
        check_ending(tokens, tokenizer, name)
        row[f"{side}_ids"] = tokens
        row[f"{side}_length"] = len(pair[side][-1]["content"])
    return row


def check_ending(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that a conversation's last token will not be taken for padding.

    Raises:
        SettingsError: if it will.
    """
    if tokens[-1] == tokenizer.pad_token_id:
        raise SettingsError(
            f"{name}: a conversation ends with {tokenizer.pad_token!r}, which also pads, so another token would be "
            "scored; take it off the text, or give a chat_template that ends otherwise."
        )
