"""Answers that a policy gives to prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...common.progress import Progress
from ...common.seeds import seed_of
from ...common.settings import SettingsError
from ...preference.template import Messages
from .log_probabilities import Answer, Tokens, prompt_tokens
from .processes import over_processes


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        num_samples: answers to a prompt.
        max_new_tokens: of an answer.
        temperature: of the softmax; at 1 the policy's own distribution.
        batch_size: answers at a time.
    """

    num_samples: int
    max_new_tokens: int
    temperature: float
    batch_size: int


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    sampling: Sampling,
    seed: int,
) -> list[list[Answer]]:
    """Return `num_samples` answers to each of `prompts`, with the token that ends them where they come to an end.

    Tokens are drawn from the whole softmax, whatever the checkpoint's generation_config.json says of penalties and the
    like: figures of the answers are to be those of the policy.

    All processes call it together, and share the batches. Each batch has random numbers of its own, by `seed` and its
    place, so that the same answers are drawn by any number of processes.
    """
    prompts_per_batch = max(sampling.batch_size // sampling.num_samples, 1)
    starts = range(0, len(prompts), prompts_per_batch)
    ends = ending_tokens(tokenizer)
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.num_samples,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
    model.eval()

    def of_batch(start: int) -> list[list[Answer]]:
        with _seeded(model.device, seed, start):
            return _sampled(model, prompts[start : start + prompts_per_batch], config)

    with _neutral_generation(model):
        return [answers for batch in over_processes(of_batch, starts) for answers in batch]


def with_room(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], room: int, name: str, progress: Progress
) -> tuple[list[Messages], list[Tokens]]:
    """Return those of `prompts` that are no longer than `room` tokens, and their tokens.

    Args:
        name: of the prompts, for errors and warnings.
        progress: it is warned of prompts that are left out.

    Raises:
        SettingsError: if none is left.
    """
    both = [(prompt, prompt_tokens(tokenizer, prompt)) for prompt in prompts]
    kept = [(prompt, tokens) for prompt, tokens in both if len(tokens) <= room]
    if not kept:
        raise SettingsError(
            f"{name}: all {len(prompts):,} prompts are longer than max_length - max_new_tokens = {room} tokens; raise "
            "max_length, or lower max_new_tokens."
        )
    if len(kept) < len(prompts):
        progress.warn(
            f"{name}: {len(prompts) - len(kept):,} of {len(prompts):,} prompts are longer than max_length - "
            f"max_new_tokens = {room} tokens, and are left out."
        )
    return [prompt for prompt, _ in kept], [tokens for _, tokens in kept]


def tell_unfinished(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer], sampling: Sampling, name: str, progress: Progress
) -> None:
    """Warn of answers that did not come to an end."""
    ends = ending_tokens(tokenizer)
    if num_unfinished := sum(answer.answer[-1] not in ends for answer in answers):
        progress.warn(
            f"{name}: {num_unfinished:,} of {len(answers):,} answers do not end within "
            f"max_new_tokens={sampling.max_new_tokens}, and are cut."
        )


def ending_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the template's special ones after it, and the end of text."""
    question = [{"role": "user", "content": "?"}]
    answered = [*question, {"role": "assistant", "content": "."}]
    rendered = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=True)["input_ids"]
    after = rendered[len(prompt_tokens(tokenizer, question)) :]
    return sorted({*set(after).intersection(tokenizer.all_special_ids), tokenizer.eos_token_id} - {None})


def answer_text(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> str:
    """Return what an answer says."""
    return tokenizer.decode(answer.answer, skip_special_tokens=True).strip()


@contextmanager
def _neutral_generation(model: PreTrainedModel) -> Iterator[None]:
    """Leave out what the checkpoint says of generation; Transformers would fill with it what a call leaves open."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@contextmanager
def _seeded(device: torch.device, *seeds: int) -> Iterator[None]:
    """Draw random numbers by `seeds` in this context, and go on as before after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(*seeds))
        yield


@torch.inference_mode()
def _sampled(model: PreTrainedModel, prompts: Sequence[Tokens], config: GenerationConfig) -> list[list[Answer]]:
    # On the left, so that each answer follows its prompt.
    width = max(map(len, prompts))
    input_ids = torch.tensor([[config.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sequences = model.generate(
        input_ids.to(model.device), attention_mask=attention_mask.to(model.device), generation_config=config
    )
    drawn = [_up_to_end(tokens, config.eos_token_id) for tokens in sequences[:, width:].tolist()]
    num = config.num_return_sequences
    return [
        [Answer(prompt, answer) for answer in drawn[index * num : (index + 1) * num]]
        for index, prompt in enumerate(prompts)
    ]


def _up_to_end(tokens: Tokens, ends: Sequence[int]) -> Tokens:
    """Return `tokens` up to the first that ends an answer; what fills up the batch comes after it."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens
