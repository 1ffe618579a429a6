"""Which pairs a round trains on: those that are given, shared out or not, or answers of the policy itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from datasets import Dataset

from ...common.files import replacing
from ...common.settings import SettingsError
from ...preference.pairs import read_pairs
from ...preference.settings import PairSettings
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


def read_pair_sets(arguments: IterativeDPOArguments) -> PairSets:
    """Return the pairs that `arguments` name, the same for the same seed.

    Pairs to learn references from are taken out of the training pairs whatever the reference, so that runs with
    different ones train on the same.

    Raises:
        SettingsError: if some are missing, or there are too few for all rounds.
    """
    pairs, merge, seed = arguments.pairs, arguments.merge, arguments.training.seed
    training = read_pairs(
        PairSettings(pairs.train_data, pairs.train_split, pairs.max_train_pairs, pairs.flip_rate, seed)
    )
    evaluation = read_pairs(PairSettings(pairs.eval_data, pairs.eval_split, pairs.max_eval_pairs))
    training = training.select(torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)).tolist())
    if merge.merge_data:
        heldout = read_pairs(PairSettings(merge.merge_data, pairs.train_split))
    else:
        num_heldout = round(merge.merge_share * len(training))
        heldout = training.select(range(num_heldout)) if num_heldout else None
        training = training.select(range(num_heldout, len(training)))
    num_heldout = len(heldout or ())
    if arguments.rounds.reference == "learned" and num_heldout < 2:
        raise SettingsError(
            f"{num_heldout} pairs to learn the reference from are too few; raise merge_share, or give merge_data."
        )
    return PairSets(_of_rounds(training, arguments), heldout, evaluation)


def _of_rounds(training: Dataset, arguments: IterativeDPOArguments) -> list[Dataset]:
    num_rounds = arguments.rounds.num_rounds
    if arguments.rounds.round_data == "same":
        return [training] * num_rounds
    if len(training) < num_rounds:
        raise SettingsError(f"{len(training)} training pairs cannot be shared out to num_rounds={num_rounds}.")
    return [training.shard(num_rounds, index, contiguous=True) for index in range(num_rounds)]


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
