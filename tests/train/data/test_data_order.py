"""The same blocks in the same steps, whatever the number of processes, and where a run goes on."""

import json
import shutil
from itertools import islice

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from training_runs import command_line, run_script
from transformers import TrainerState

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.arguments import DataArguments
from upcycled_moe.train.data.blocks import ResumableBlocks, SavePositionCallback, read_position, resume_position
from upcycled_moe.train.data.sources import training_blocks
from upcycled_moe.train.train import main
from upcycled_moe.train.training_arguments import UpcyclingTrainingArguments


BATCH_SIZE = 2
ORDERS = {
    "streamed": {},
    "weighed": {"domain_weights": {"math": 1, "code": 2}},
    "shuffled": {"streaming": False},
    "shuffled, weighed": {"streaming": False, "domain_weights": {"math": 1, "code": 2}},
}


class _Characters:
    """A tokenizer whose tokens are code points."""

    eos_token_id = 0

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


@pytest.fixture
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in ("math", "code"):
        texts = [f"{name}{number:02}" * (number % 7) for number in range(30)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder)


def _blocks(text, order, **settings):
    data_args = DataArguments(train_data=[text], block_size=8, **ORDERS[order], **settings)
    return training_blocks(data_args, _Characters(), seed=3)


def _steps(make_blocks, num_processes, num_steps):
    """Return the blocks of each step of 4 blocks, which processes draw as Accelerate lets them."""
    shards = [
        iter(IterableDatasetShard(make_blocks(), BATCH_SIZE, num_processes=num_processes, process_index=process))
        for process in range(num_processes)
    ]
    num_micro_batches = 4 // (BATCH_SIZE * num_processes)
    return [
        [block for _ in range(num_micro_batches) for shard in shards for block in islice(shard, BATCH_SIZE)]
        for _ in range(num_steps)
    ]


def _arguments(folder):
    return UpcyclingTrainingArguments(
        output_dir=str(folder),
        max_steps=100,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=2,
        eval_strategy="no",
        report_to="none",
        use_cpu=True,
    )


def _save(blocks, folder, step):
    """Write the position after `step` steps of a run that has read further."""
    callback, args = SavePositionCallback(blocks), _arguments(folder)
    callback.on_train_begin(args, TrainerState(), None)
    callback.on_checkpoint(args, TrainerState(global_step=step), folder)


@pytest.mark.parametrize("order", ORDERS)
def test_another_number_of_processes_sees_the_same_blocks_in_the_same_steps(text, tmp_path, order):
    expected = _steps(lambda: _blocks(text, order), num_processes=1, num_steps=30)
    assert _steps(lambda: _blocks(text, order), num_processes=2, num_steps=30) == expected

    blocks = _blocks(text, order)
    list(islice(blocks, 11 * 4 + 3))
    _save(blocks, tmp_path, step=11)

    def resumed():
        resumable = ResumableBlocks(_blocks(text, order))
        resume_position(tmp_path, resumable, _arguments(tmp_path))
        return resumable

    for num_processes in (1, 2):
        steps = _steps(resumed, num_processes, num_steps=30)
        assert all(block == {"input_ids": [-1]} for step in steps[:11] for block in step)
        assert steps[11:] == expected[11:]


def test_a_worker_that_reads_ahead_tells_its_position(text):
    expected = list(islice(_blocks(text, "streamed"), 30))
    blocks = _blocks(text, "streamed")
    start = None
    for position in (7, 20):
        # The second worker goes on where the first was left, as in a resumed run.
        blocks.follow_worker()
        resumable = ResumableBlocks(blocks)
        if start is not None:
            resumable.resume(start)
        loader = DataLoader(resumable, batch_size=None, num_workers=1, collate_fn=lambda block: block)
        read = list(islice(loader, position))
        assert read[position - 6 :] == expected[position - 6 : position]
        start = json.loads(json.dumps(blocks.state_dict(position)))
        assert start == _position_without_worker(text, position)


def _position_without_worker(text, num_blocks):
    blocks = _blocks(text, "streamed")
    list(islice(blocks, num_blocks))
    return blocks.state_dict()


def test_a_position_stays_small_however_long_the_documents(tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("a long story " * 100_000)
    blocks = _blocks(str(text), "streamed")
    read = list(islice(blocks, 5000))
    _save(blocks, tmp_path, step=1200)
    assert (tmp_path / "data_position.json").stat().st_size < 1000

    resumable = ResumableBlocks(_blocks(str(text), "streamed"))
    resume_position(tmp_path, resumable, _arguments(tmp_path))
    assert next(islice(resumable, 4800, None)) == read[4800]


@pytest.mark.parametrize(
    ("order", "other", "settings", "message"),
    [
        ("streamed", "shuffled", {}, "this run has"),
        ("weighed", "streamed", {}, "was saved with {'math': 1, 'code': 2} as domain_weights, this run has None"),
        ("shuffled", "shuffled", {"shuffle_documents": False}, "was saved with 3 as the seed of shuffle_documents"),
    ],
)
def test_a_position_in_another_order_is_refused(text, tmp_path, order, other, settings, message):
    blocks = _blocks(text, order)
    list(islice(blocks, 4))
    _save(blocks, tmp_path, step=1)

    with pytest.raises(SettingsError) as error:
        resume_position(tmp_path, ResumableBlocks(_blocks(text, other, **settings)), _arguments(tmp_path))
    assert message in str(error.value)


def test_a_position_of_an_earlier_version_reads_the_text_again(text, tmp_path):
    """It says which batch of documents it is in; the order of streamed text has not changed since."""
    saved = {"num_processes": 1, "blocks_per_step": 4, "block_size": 8, "num_texts": 2}
    batch = {"num_blocks": 3, "documents": None, "leftover": [1, 2]}
    (tmp_path / "data_position.json").write_text(json.dumps({**saved, "num_blocks": 4, "batch": batch}))
    assert read_position(tmp_path)["order"] == {"num_texts": 2}

    resumable = ResumableBlocks(_blocks(text, "streamed"))
    resume_position(tmp_path, resumable, _arguments(tmp_path))
    assert next(iter(resumable)) == next(iter(_blocks(text, "streamed")))


@pytest.mark.distributed
def test_a_run_goes_on_with_two_processes_where_one_stopped(settings, moe_checkpoint, tmp_path):
    """Tokenized once by whoever comes first, weighed, and packed with documents apart."""
    settings |= {"model_name_or_path": moe_checkpoint, "tokens_per_step": 256, "streaming": False, "max_steps": 4}
    settings |= {"domain_weights": "{detective: 1, travel: 2}", "save_strategy": "steps", "save_steps": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(command_line({**settings, "output_dir": whole})) == 0
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")

    settings |= {"output_dir": resumed, "resume_from_checkpoint": "last"}
    result = run_script(settings, num_processes=2, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    positions = [
        json.loads((folder / "checkpoint-4" / "data_position.json").read_text()) for folder in (whole, resumed)
    ]
    assert positions[1] == {**positions[0], "num_processes": 2}
    weights, expected = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
