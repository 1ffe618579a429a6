"""The pairs of a reward model's training, as tokens."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...common.progress import Progress
from ...preference.pairs import read_pairs
from ...preference.settings import PairSettings
from ...preference.template import TokenizedPairs, tokenize_pairs
from .reward_arguments import PairArguments


def read_pair_rows(
    data_args: PairArguments, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int, progress: Progress
) -> tuple[TokenizedPairs, Dataset | None]:
    """Return the pairs to train on, with the share that is asked for flipped, and those to measure, if there are any.

    Args:
        seed: of which pairs are flipped.

    Raises:
        SettingsError: if something cannot be read, or no pair is short enough.
    """
    training = PairSettings(
        data_args.train_data, data_args.train_split, data_args.max_train_pairs, data_args.flip_rate, seed
    )
    train_pairs = tokenize_pairs(read_pairs(training, progress), tokenizer, max_length, "train_data", progress)
    if not data_args.eval_data:
        return train_pairs, None
    evaluation = PairSettings(data_args.eval_data, data_args.eval_split, data_args.max_eval_pairs)
    eval_pairs = read_pairs(evaluation, progress)
    return train_pairs, tokenize_pairs(eval_pairs, tokenizer, max_length, "eval_data", progress).rows
