"""Blocks for the Trainer: training streams that resume where they stopped, and evaluation sets by domain.

Dimensions: B blocks in a batch, S block size.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ...common.blocks import IGNORED_LABEL, blocks_by_domain, collate_blocks, collate_blocks_for_flash_attention
from ...common.files import replacing
from ...common.packing import PackedBlocks
from ...common.settings import SettingsError
from ...common.text import open_text
from ..arguments import DataArguments
from ..engines import data_parallel_size


POSITION_FILE = "data_position.json"
# What the blocks depend on, in words; what explains most of the others comes first.
ORDER_NAMES = {
    "domain_weights": "as domain_weights",
    "streaming": "as streaming",
    "document_mask": "as document_mask",
    "num_texts": "files or datasets in train_data",
    "texts": "in train_data (names, sizes, order, split and text_column count)",
    "tokenizer": "as the digest of the tokenizer",
    "num_documents": "documents in train_data",
    "tokens": "as the digest of the tokens that train_data becomes",
    "shuffle_seed": "as the seed of shuffle_documents",
}
# Positions of earlier versions do not tell these, and are not refused for it.
UNTOLD_BEFORE = ("document_mask", "texts", "tokenizer", "tokens")


def choose_collator(
    attn_implementation: str | None, args: TrainingArguments, document_mask: bool
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """Return what makes batches of blocks for a model with that attention; to be called before the Trainer is made.

    Raises:
        SettingsError: if the run keeps attention from telling documents apart.
    """
    if document_mask and args.use_cache:
        raise SettingsError(
            "use_cache=true: with a cache, attention does not tell packed documents apart; leave it out, or set "
            "document_mask=false."
        )
    if "flash" not in (attn_implementation or ""):
        return collate_blocks
    # Otherwise Accelerate's first process reads for all, and would cut the bounds as it cuts the batch.
    args.accelerator_config.dispatch_batches = False
    return collate_blocks_for_flash_attention


class ResumableBlocks(torch.utils.data.IterableDataset):
    """A stream of training blocks that a resumed run passes over without reading the text again.

    The Trainer resumes by drawing the batches that were trained on and dropping them. That is exact whatever the
    number of processes or the loader's read-ahead, but tokenizes all of their text. After `resume` the stream answers
    those draws with placeholders and then goes on from the saved position.
    """

    def __init__(self, blocks: PackedBlocks):
        self.blocks = blocks
        self._num_placeholders = 0

    def resume(self, state: dict[str, Any]) -> None:
        """Begin the next iteration with placeholders up to the position `state`, and with real blocks after it."""
        self._num_placeholders = state["num_blocks"]
        self.blocks.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        num_placeholders, self._num_placeholders = self._num_placeholders, 0
        # No embedding has the token -1: a placeholder that is trained on by mistake is an error.
        yield from repeat({"input_ids": [-1]}, num_placeholders)
        yield from self.blocks


class SavePositionCallback(TrainerCallback):
    """Writes the position in the text into each checkpoint."""

    def __init__(self, blocks: PackedBlocks):
        self.blocks = blocks

    def on_train_begin(self, args, state, control, **kwargs):
        # Each process draws the blocks of all, and Accelerate's loader is one micro-batch ahead.
        num_blocks = args.per_device_train_batch_size * args.world_size
        num_batches = 4 + (args.dataloader_prefetch_factor or 0)
        self.blocks.max_read_ahead = max(self.blocks.max_read_ahead, num_batches * num_blocks)
        if args.dataloader_num_workers:
            self.blocks.follow_worker()

    def on_step_end(self, args, state, control, **kwargs):
        self.blocks.catch_up()

    def on_checkpoint(self, args, state, folder: Path) -> None:
        """Write the position into the checkpoint that is being made in `folder`."""
        if not args.should_save:
            return
        num_blocks = blocks_per_step(args)
        position = {
            "num_processes": args.world_size,
            "blocks_per_step": num_blocks,
            "block_size": self.blocks.block_size,
            "order": self.blocks.describe(),
            **self.blocks.state_dict(state.global_step * num_blocks),
        }
        with replacing(folder / POSITION_FILE) as path, path.open("w", encoding="utf-8") as file:
            json.dump(position, file)
            file.flush()
            os.fsync(file.fileno())


def read_position(checkpoint: str | Path) -> dict[str, Any] | None:
    """Return what [`SavePositionCallback`] wrote into `checkpoint`, or None if there is nothing.

    Raises:
        ValueError: if it is not what was written.
    """
    path = Path(checkpoint, POSITION_FILE)
    if not path.is_file():
        return None
    try:
        position = json.loads(path.read_text(encoding="utf-8"))
        numbers = [position[name] for name in ("num_processes", "blocks_per_step", "block_size")]
        if "order" not in position:
            # As it was written when there was one order only.
            position["order"] = {"num_texts": position["num_texts"]}
        if "source" in position:
            numbers += [position["num_blocks"], position["offset"]]
        is_valid = all(isinstance(number, int) for number in numbers)
    except (ValueError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"{POSITION_FILE} is empty or cut short")
    return position


def blocks_per_step(args: TrainingArguments) -> int:
    """Return the number of blocks in the global batch."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * data_parallel_size(args)


def resume_position(checkpoint: str | Path, blocks: ResumableBlocks, args: TrainingArguments) -> None:
    """Let `blocks` go on where `checkpoint` was saved; without a saved position the text is read again up to there.

    Raises:
        SettingsError: if the checkpoint was made with another global batch, block size, document mask, or text.
    """
    state = read_position(checkpoint)
    if state is None:
        return
    current = {"blocks_per_step": blocks_per_step(args), "block_size": blocks.blocks.block_size}
    for name, value in current.items():
        if state[name] != value:
            raise SettingsError(
                f"{checkpoint}: was saved with {name}={state[name]}, this run has {value}; resume with the same "
                "global batch (per_device_train_batch_size x gradient_accumulation_steps x processes) and block_size."
            )
    _check_order(checkpoint, state["order"], blocks.blocks.describe())
    if state["num_processes"] != args.world_size and args.process_index == 0:
        print(
            f"train.py: warning: {checkpoint} has the random states of {state['num_processes']} processes, this run "
            f"has {args.world_size}; noise and dropout will be others.",
            file=sys.stderr,
        )
    if "source" in state:
        blocks.resume({name: state[name] for name in ("num_blocks", "source", "offset")})


def _check_order(checkpoint: str | Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    # Streamed text does not tell that it is.
    saved, current = ({"streaming": True, **order} for order in (saved, current))
    for name, what in ORDER_NAMES.items():
        if name in UNTOLD_BEFORE and name not in saved:
            continue
        if saved.get(name) != current.get(name):
            raise SettingsError(
                f"{checkpoint}: was saved with {saved.get(name)} {what}, this run has {current.get(name)}; resume "
                "with the same text, read in the same way, or begin anew in another output_dir."
            )


def evaluation_sets(
    data_args: DataArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Dataset]:
    """Return the first `max_eval_blocks` blocks of each domain in the evaluation text.

    Only these are held in memory, and a text of one domain is read no further than it takes. A text with a `domain`
    column is read to its end, since nothing tells earlier which domains it holds.

    Each set is filled up with blocks without targets until all processes have the same number of whole batches, so
    that none repeats a block and the figures do not depend on the number of processes.

    Raises:
        SettingsError: if a domain has less text than one block.
    """
    documents = open_text(data_args.eval_data, data_args.eval_split, data_args.text_column)
    domains = blocks_by_domain(
        documents, tokenizer, data_args.block_size, data_args.max_eval_blocks, data_args.document_mask
    )
    batch_size = training_args.per_device_eval_batch_size * training_args.world_size
    sets = {}
    for name, blocks in sorted(domains.items()):
        if not blocks:
            raise SettingsError(
                f"The evaluation text of {name!r} is shorter than one block of {data_args.block_size} tokens."
            )
        with_labels = [{**block, "labels": block["input_ids"]} for block in blocks]
        no_targets = {**blocks[0], "labels": [IGNORED_LABEL] * data_args.block_size}
        sets[name] = Dataset.from_list(with_labels + [no_targets] * (-len(blocks) % batch_size))
    return sets
