"""Rewards of the answers that a policy draws."""

from collections.abc import Sequence

from ...common.progress import Progress
from ...preference.scoring import load_reward_model, score_conversations
from .processes import of_first_process


def score_answers(
    reward_model: str,
    prompts: Sequence[list[dict[str, str]]],
    answers: Sequence[Sequence[str]],
    batch_size: int,
    progress: Progress,
) -> list[list[float]]:
    """Return the reward of each of `answers` to each of `prompts`; the first process computes them for all.

    Raises:
        SettingsError: if `reward_model` is no reward model.
    """
    return of_first_process(lambda: _scored(reward_model, prompts, answers, batch_size, progress))


def _scored(
    reward_model: str,
    prompts: Sequence[list[dict[str, str]]],
    answers: Sequence[Sequence[str]],
    batch_size: int,
    progress: Progress,
) -> list[list[float]]:
    conversations = [
        [*prompt, {"role": "assistant", "content": text}]
        for prompt, texts in zip(prompts, answers, strict=True)
        for text in texts
    ]
    model, tokenizer = load_reward_model(reward_model)
    scores = iter(score_conversations(model, tokenizer, conversations, batch_size, progress=progress))
    return [[next(scores) for _ in texts] for texts in answers]
