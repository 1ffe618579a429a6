"""Shares of preference pairs that have no prompt in common: what is learned from one says nothing false of another."""

import json
from collections.abc import Sequence
from itertools import accumulate

import torch
from datasets import Dataset


def shares_by_prompt(pairs: Dataset, shares: Sequence[float], generator: torch.Generator) -> list[Dataset]:
    """Return parts of `pairs`, drawn at random, all pairs with one prompt in the same part.

    A part ends with the prompt by which it has its share; with very few prompts it may have much more, or nothing.

    Args:
        shares: of all pairs, one for each part, adding up to one.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(pairs["prompt"]):
        groups.setdefault(_key(prompt), []).append(index)
    by_prompt = list(groups.values())
    ends = [round(end * len(pairs)) for end in accumulate(shares)]
    parts: list[list[int]] = [[] for _ in shares]
    part = num_placed = 0
    for place in torch.randperm(len(by_prompt), generator=generator).tolist():
        while num_placed >= ends[part] and part < len(parts) - 1:
            part += 1
        parts[part] += by_prompt[place]
        num_placed += len(by_prompt[place])
    return [pairs.select(indices) for indices in parts]


def num_with_prompts_of(pairs: Dataset, others: Dataset) -> int:
    """Return how many of `pairs` have a prompt that one of `others` has too."""
    known = {_key(prompt) for prompt in others["prompt"]}
    return sum(_key(prompt) in known for prompt in pairs["prompt"])


def _key(prompt: Sequence[dict[str, str]]) -> str:
    return json.dumps(prompt, sort_keys=True)
