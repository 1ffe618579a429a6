"""The same blocks in the same steps, whatever the number of processes, and where a run goes on."""

import copy
import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from process_groups import run_group
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from training_runs import command_line
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
    return _write_text(tmp_path_factory.mktemp("text"))


def _write_text(folder, names=("math", "code")):
    folder.mkdir(exist_ok=True)
    for name in names:
        texts = [f"{name}{number:02}" * (number % 7) for number in range(30)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder)


def _blocks(text, order, tokenizer=None, **settings):
    settings = {"train_data": [text], "block_size": 8, **ORDERS[order], **settings}
    return training_blocks(DataArguments(**settings), tokenizer or _Characters(), seed=3)


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
        # Its worker lives until the position is asked for, as in a run.
        batches = iter(loader)
        read = list(islice(batches, position))
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


@pytest.mark.parametrize("order", ["streamed", "shuffled"])
def test_a_position_in_as_many_documents_of_other_text_is_refused(tmp_path, order):
    """Number and names of files, documents and columns are the same, or the sizes are."""
    first, second = (_write_text(tmp_path / name, ("text",)) for name in ("first", "second"))
    file = Path(second, "text.jsonl")
    rows = [json.loads(line) | {"other": "x"} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "text": f"{row['text']}!"}) + "\n" for row in rows))
    shutil.copytree(second, tmp_path / "moved")
    both = [f"{first}/text.jsonl", f"{second}/text.jsonl"]
    what = {"streamed": "in train_data", "shuffled": "as the digest of the tokens"}[order]

    _save_start(_blocks(first, order), tmp_path)
    assert what in _refusal(_blocks(second, order), tmp_path)
    _save_start(_blocks(second, order), tmp_path)
    assert what in _refusal(_blocks(second, order, text_column="other"), tmp_path)
    assert _refusal(_blocks(str(tmp_path / "moved"), order), tmp_path) is None
    _save_start(_blocks(None, order, train_data=both), tmp_path)
    assert what in _refusal(_blocks(None, order, train_data=both[::-1]), tmp_path)


@pytest.mark.parametrize("order", ORDERS)
def test_a_position_of_another_tokenizer_or_mask_is_refused(text, tmp_path, order):
    without_end = _Characters()
    without_end.eos_token_id = None
    _save_start(_blocks(text, order), tmp_path)
    what = "tokens" if "shuffled" in order else "tokenizer"
    assert f"digest of the {what}" in _refusal(_blocks(text, order, without_end), tmp_path)
    message = "was saved with True as document_mask, this run has False"
    assert message in _refusal(_blocks(text, order, document_mask=False), tmp_path)
    assert _refusal(_blocks(text, order), tmp_path) is None


def test_a_tokenizer_stays_the_same_while_it_is_used(text, tmp_path, tokenizer):
    """Calls change how it truncates; another vocabulary makes it another."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer("text", truncation=True, max_length=4)
    _save_start(_blocks(text, "streamed", tokenizer), tmp_path)
    tokenizer("text", padding=True)
    assert _refusal(_blocks(text, "streamed", tokenizer), tmp_path) is None
    tokenizer.add_tokens(["math"])
    assert "digest of the tokenizer" in _refusal(_blocks(text, "streamed", tokenizer), tmp_path)


def _save_start(blocks, folder):
    list(islice(blocks, 4))
    _save(blocks, folder, step=1)


def _refusal(blocks, folder):
    """Return why `blocks` do not go on at the position in `folder`, or None if they do."""
    try:
        resume_position(folder, ResumableBlocks(blocks), _arguments(folder))
    except SettingsError as error:
        return str(error)
    return None


@pytest.mark.parametrize("order", ORDERS)
def test_a_position_that_tells_less_of_the_text_goes_on(text, tmp_path, order):
    """That of an earlier version has numbers, weights and seed only."""
    expected = list(islice(_blocks(text, order), 12))
    _save_start(_blocks(text, order), tmp_path)
    file = tmp_path / "data_position.json"
    position = json.loads(file.read_text())
    for name in ("texts", "tokenizer", "tokens", "document_mask"):
        position["order"].pop(name, None)
    file.write_text(json.dumps(position))

    resumable = ResumableBlocks(_blocks(text, order))
    resume_position(tmp_path, resumable, _arguments(tmp_path))
    assert list(islice(resumable, 4, 12)) == expected[4:]


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
    log, cache = tmp_path / "log", tmp_path / "cache"
    statuses = run_group(settings, log, num_processes=2, with_engines=False, HF_DATASETS_CACHE=str(cache))
    assert statuses == [0, 0], log.read_text()
    assert list(cache.rglob("*.arrow"))
    positions = [
        json.loads((folder / "checkpoint-4" / "data_position.json").read_text()) for folder in (whole, resumed)
    ]
    assert positions[1] == {**positions[0], "num_processes": 2}
    weights, expected = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
