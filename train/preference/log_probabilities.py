"""Log-probabilities of answers, as DPO counts them: of a policy, and of the reference that it is compared with.

Dimensions: S tokens of a sequence, A tokens of an answer, H hidden, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...common.progress import Progress
from ...common.settings import SettingsError
from ...preference.template import conversation_ids
from ..errors import RunError
from .processes import over_processes


Tokens = list[int]


class Answer(NamedTuple):
    """Tokens of a prompt, and of an answer to it."""

    prompt: Tokens
    answer: Tokens


class TokenizedAnswers(NamedTuple):
    """Pairs as tokens: columns `prompt_ids`, `chosen_ids`, `rejected_ids` and `source`.

    Args:
        rows: the pairs that are left.
        num_dropped: pairs whose prompt alone is `max_length` tokens long.
        num_cut: pairs of `rows` that have an answer whose end was cut off.
    """

    rows: Dataset
    num_dropped: int
    num_cut: int

    def answers(self, column: str) -> list[Answer]:
        """Return the answers in `column`, with their prompts."""
        return [Answer(*both) for both in zip(self.rows["prompt_ids"], self.rows[column], strict=True)]


def tokenize_answers(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str
) -> TokenizedAnswers:
    """Return `pairs` of conversations as tokens, at most `max_length` of prompt and answer together.

    Args:
        name: of the pairs, for errors.

    Raises:
        SettingsError: if no pair is left, or the template refuses one.
    """
    rows, num_cut = [], 0
    for pair in pairs:
        row = _tokenized(pair, tokenizer)
        room = max_length - len(row["prompt_ids"])
        if room > 0:
            num_cut += max(len(row["chosen_ids"]), len(row["rejected_ids"])) > room
            rows.append(row | {column: row[column][:room] for column in ("chosen_ids", "rejected_ids")})
    if not rows:
        raise SettingsError(
            f"{name}: every prompt is {max_length} tokens long or longer; raise max_length, or give shorter ones."
        )
    return TokenizedAnswers(Dataset.from_list(rows), len(pairs) - len(rows), num_cut)


def tell_lengths(pairs: TokenizedAnswers, max_length: int, name: str, progress: Progress) -> None:
    """Warn of pairs that were left out or cut."""
    if pairs.num_dropped or pairs.num_cut:
        progress.warn(
            f"{name}: max_length={max_length}: {pairs.num_dropped:,} pairs are left out, as their prompt fills it, "
            f"and {pairs.num_cut:,} of {len(pairs.rows):,} have an answer whose end is cut off."
        )


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> Tokens:
    """Return the tokens of a conversation up to where its next answer begins.

    Raises:
        SettingsError: if the template refuses it.
    """
    return conversation_ids(tokenizer, messages, add_generation_prompt=True)


def _tokenized(pair: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    prompt = prompt_tokens(tokenizer, pair["prompt"])
    chosen, rejected = (conversation_ids(tokenizer, pair["prompt"] + pair[side]) for side in ("chosen", "rejected"))
    # A template or a merge of tokens may render the end of a prompt otherwise once an answer follows.
    length = min(_common_length(prompt, chosen), _common_length(prompt, rejected))
    return {
        "prompt_ids": prompt[:length],
        "chosen_ids": chosen[length:],
        "rejected_ids": rejected[length:],
        "source": pair["source"],
    }


def _common_length(first: Tokens, second: Tokens) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


class AnswerScorer:
    """Computes `ln p(answer | prompt)` under a model, in nats.

    All processes call it together, and share the batches; each has the whole result. What is in a batch does not
    depend on their number.

    Args:
        pad_token_id: of the tokens that fill up a batch; they are masked.
        batch_size: answers at a time.
        autocast: type of the computation, if not that of the weights.
    """

    def __init__(self, pad_token_id: int, batch_size: int, autocast: torch.dtype | None = None):
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.autocast = autocast

    def __call__(self, model: PreTrainedModel, answers: Sequence[Answer]) -> list[float]:
        """Return the log-probability of each of `answers`, summed over its tokens.

        Raises:
            RunError: if one is not finite: the model is ruined.
        """
        batches = [answers[begin : begin + self.batch_size] for begin in range(0, len(answers), self.batch_size)]
        model.eval()
        scores = over_processes(lambda batch: self._of_batch(model, batch), batches)
        of_answers = [score for batch in scores for score in batch]
        if num_broken := sum(not math.isfinite(score) for score in of_answers):
            raise RunError(
                f"{num_broken:,} of {len(answers):,} answers have log-probabilities that are not finite: the weights "
                "of a policy are ruined, or overflow; begin anew in another output_dir, with a lower learning_rate."
            )
        return of_answers

    @torch.inference_mode()
    def _of_batch(self, model: PreTrainedModel, batch: Sequence[Answer]) -> list[float]:
        lengths = [len(prompt) + len(answer) for prompt, answer in batch]
        input_ids = torch.full((len(batch), max(lengths)), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, (prompt, answer) in enumerate(batch):
            input_ids[row, : lengths[row]] = torch.tensor(prompt + answer)
            attention_mask[row, : lengths[row]] = 1
        device = model.device
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            hidden_states = model.base_model(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
            ).last_hidden_state  # [batch, S, H]
            # Logits of one answer at a time: those of a batch may not fit into memory.
            return [
                self._of_answer(model, hidden_states[row, len(prompt) - 1 : lengths[row] - 1], answer)
                for row, (prompt, answer) in enumerate(batch)
            ]

    def _of_answer(self, model: PreTrainedModel, hidden_states: torch.Tensor, answer: Tokens) -> float:
        """Return the sum over an answer, each token of which is predicted by one of `hidden_states` [A, H]."""
        log_probs = model.get_output_embeddings()(hidden_states).float().log_softmax(dim=-1)  # [A, V]
        targets = torch.tensor(answer, device=log_probs.device)
        return log_probs.gather(1, targets[:, None]).double().sum().item()
