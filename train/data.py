"""Blocks for the Trainer: training streams that resume where they stopped, and evaluation sets by domain.

Dimensions: B blocks in a batch, S block size.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ..common.settings import SettingsError
from ..common.text import PackedBlocks, open_text, pack_blocks
from .arguments import DataArguments


POSITION_FILE = "data_position.json"
IGNORED_LABEL = -100


def collate_blocks(blocks: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `labels` [B, S].

    Every token is a target, unlike with Transformers' own collator, which ignores the end-of-text tokens of models
    that pad with them.
    """
    input_ids = torch.tensor([block["input_ids"] for block in blocks])
    labels = torch.tensor([block["labels"] for block in blocks]) if "labels" in blocks[0] else input_ids.clone()
    return {"input_ids": input_ids, "labels": labels}


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

    def on_save(self, args, state, control, **kwargs):
        if not args.should_save or args.dataloader_num_workers:
            # The text is read in a worker, whose position is out of reach: a resumed run reads it again.
            return
        num_blocks = blocks_per_step(args)
        position = self.blocks.state_dict(state.global_step * num_blocks)
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        (folder / POSITION_FILE).write_text(
            json.dumps({"blocks_per_step": num_blocks, "block_size": self.blocks.block_size, **position})
        )


def blocks_per_step(args: TrainingArguments) -> int:
    """Return the number of blocks in the global batch."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def resume_position(checkpoint: str | Path, blocks: ResumableBlocks, args: TrainingArguments) -> None:
    """Let `blocks` go on where `checkpoint` was saved; without a saved position the text is read again up to there.

    Raises:
        SettingsError: if the checkpoint was made with another global batch or block size.
    """
    path = Path(checkpoint, POSITION_FILE)
    if not path.is_file():
        return
    state = json.loads(path.read_text())
    current = {"blocks_per_step": blocks_per_step(args), "block_size": blocks.blocks.block_size}
    for name, value in current.items():
        if state[name] != value:
            raise SettingsError(
                f"{checkpoint}: was saved with {name}={state[name]}, this run has {value}; resume with the same "
                "global batch (per_device_train_batch_size x gradient_accumulation_steps x processes) and block_size."
            )
    blocks.resume(state)


def evaluation_sets(
    data_args: DataArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Dataset]:
    """Return the blocks of each domain in the evaluation text; they are few enough to be held in memory.

    Each set is filled up with blocks without targets until all processes have the same number of whole batches, so
    that none repeats a block and the figures do not depend on the number of processes.

    Raises:
        SettingsError: if a domain has less text than one block.
    """
    texts: dict[str, list[str]] = {}
    for document in open_text(data_args.eval_data, data_args.eval_split, data_args.text_column):
        texts.setdefault(document["domain"], []).append(document["text"])
    batch_size = training_args.per_device_eval_batch_size * training_args.world_size
    sets = {}
    for name in sorted(texts):
        documents = Dataset.from_dict({"text": texts[name]}).to_iterable_dataset()
        packed = pack_blocks(documents, tokenizer, data_args.block_size)
        blocks = [block["input_ids"] for block in islice(packed, data_args.max_eval_blocks)]
        if not blocks:
            raise SettingsError(
                f"The evaluation text of {name!r} is shorter than one block of {data_args.block_size} tokens."
            )
        num_missing = -len(blocks) % batch_size
        no_targets = [IGNORED_LABEL] * data_args.block_size
        sets[name] = Dataset.from_dict(
            {"input_ids": blocks + blocks[:1] * num_missing, "labels": blocks + [no_targets] * num_missing}
        )
    return sets
