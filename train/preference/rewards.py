"""Rewards of the answers that a policy draws."""

from collections.abc import Sequence

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ...common.progress import Progress
from ...preference.scoring import load_reward_model, score_conversations


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
    shared = [None]
    if PartialState().is_main_process:
        conversations = [
            [*prompt, {"role": "assistant", "content": text}]
            for prompt, texts in zip(prompts, answers, strict=True)
            for text in texts
        ]
        model, tokenizer = load_reward_model(reward_model)
        scores = iter(score_conversations(model, tokenizer, conversations, batch_size=batch_size, progress=progress))
        shared = [[[next(scores) for _ in texts] for texts in answers]]
    broadcast_object_list(shared)
    return shared[0]
