"""Which pairs a round trains on: those that are given, shared out or not, or answers of the policy itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from datasets import Dataset

from ...common.files import replacing
from ...common.progress import Progress
from ...common.seeds import seed_of
from ...common.settings import SettingsError
from ...preference.pairs import read_pairs
from ...preference.settings import PairSettings
from ...preference.shares import num_with_prompts_of, shares_by_prompt
from .dpo_arguments import IterativeDPOArguments


class PairSets(NamedTuple):
    """All pairs of a run.

    Args:
        rounds: of each round; with `round_data=on_policy` only their prompts count.
        merge: to learn references from, None without.
        evaluation: to measure each policy with.
    """

    rounds: list[Dataset]
    merge: Dataset | None
    evaluation: Dataset


def read_pair_sets(arguments: IterativeDPOArguments, progress: Progress) -> PairSets:
    """Return the pairs that `arguments` name, the same for the same seed.

    Rounds have no prompt in common, unless all of them train on the same pairs. Pairs to learn references from are
    taken out of the training pairs whatever the reference, so that runs with different ones train on the same.

    Args:
        progress: it is warned of pairs that are left out, and of prompts that are trained on and measured with.

    Raises:
        SettingsError: if some are missing, or there are too few for all rounds.
    """
    pairs, merge, seed = arguments.pairs, arguments.merge, arguments.training.seed
    training = read_pairs(
        PairSettings(pairs.train_data, pairs.train_split, pairs.max_train_pairs, pairs.flip_rate, seed), progress
    )
    evaluation = read_pairs(PairSettings(pairs.eval_data, pairs.eval_split, pairs.max_eval_pairs), progress)
    _warn_of_known_prompts(evaluation, "eval_data", training, progress)
    heldout_share = 0.0 if merge.merge_data else merge.merge_share
    heldout, *rounds = _shared_out(training, heldout_share, arguments)
    if merge.merge_data:
        heldout = read_pairs(PairSettings(merge.merge_data, pairs.train_split), progress)
        _warn_of_known_prompts(heldout, "merge_data", training, progress)
    if arguments.rounds.reference == "learned" and len(heldout) < 2:
        raise SettingsError(
            f"{len(heldout)} pairs to learn the reference from are too few; raise merge_share, or give merge_data."
        )
    return PairSets(rounds, heldout if len(heldout) else None, evaluation)


def _shared_out(training: Dataset, heldout_share: float, arguments: IterativeDPOArguments) -> list[Dataset]:
    """Return the pairs that are held out for the reference, and those of each round."""
    num_rounds, is_same = arguments.rounds.num_rounds, arguments.rounds.round_data == "same"
    num_parts = 1 if is_same else num_rounds
    generator = torch.Generator().manual_seed(seed_of(arguments.training.seed, "shares"))
    shares = [heldout_share] + [(1 - heldout_share) / num_parts] * num_parts
    heldout, *parts = shares_by_prompt(training, shares, generator)
    if not all(map(len, parts)):
        raise SettingsError(
            f"{len(training)} training pairs cannot be shared out to num_rounds={num_rounds}, with each prompt in one "
            "share; give more, or lower num_rounds."
        )
    return [heldout, *(parts * num_rounds if is_same else parts)]


def _warn_of_known_prompts(pairs: Dataset, name: str, training: Dataset, progress: Progress) -> None:
    if num_known := num_with_prompts_of(pairs, training):
        progress.warn(
            f"{name}: {num_known:,} of {len(pairs):,} pairs have a prompt that train_data has too; figures of them "
            "say little of other prompts."
        )


def best_and_worst(
    prompts: Sequence[list[dict[str, str]]],
    answers: Sequence[Sequence[str]],
    rewards: Sequence[Sequence[float]],
    flip_rate: float,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Return a pair for each prompt: the answer with the highest reward is chosen, that with the lowest rejected.

    Prompts whose answers are alike, or have the same reward, give none.

    Args:
        answers, rewards: of each prompt, in the same order.
        flip_rate: share of the pairs, drawn at random, whose answers are exchanged.
    """
    pairs = []
    for prompt, texts, scores in zip(prompts, answers, rewards, strict=True):
        best, worst = (scores.index(limit) for limit in (max(scores), min(scores)))
        if scores[best] > scores[worst] and texts[best] != texts[worst]:
            pairs.append(
                {
                    "prompt": prompt,
                    "chosen": [{"role": "assistant", "content": texts[best]}],
                    "rejected": [{"role": "assistant", "content": texts[worst]}],
                    "source": "policy",
                    "rewards": [scores[best], scores[worst]],
                }
            )
    order = torch.randperm(len(pairs), generator=generator).tolist()
    for index in order[: round(flip_rate * len(pairs))]:
        pair = pairs[index]
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    return pairs


def write_rows(rows: Dataset, path: Path) -> None:
    """Write `rows` to the parquet file `path`, whole or not at all."""
    with replacing(path) as partial:
        pq.write_table(rows.with_format("arrow")[:], partial)


def read_rows(path: Path) -> Dataset:
    """Return the rows of the parquet file `path`, without a copy in a cache."""
    return Dataset(pq.read_table(path))
