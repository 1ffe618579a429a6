"""Blocks for the Trainer: documents that do not see each other, and evaluation blocks as if each domain was alone."""

import json

import pytest
import torch
from training_runs import SHAPE
from transformers import (
    AttentionInterface,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_upcycled_moe import UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM
from modeling_upcycled_moe.losses_upcycled_moe import router_losses
from upcycled_moe.common.blocks import (
    blocks_by_domain,
    collate_blocks,
    collate_blocks_for_flash_attention,
    count_targets,
)
from upcycled_moe.common.packing import BlockPacker
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.text import TextSource, TextStream, open_text, pack_blocks
from upcycled_moe.train.data.blocks import choose_collator


SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
MODELS = {
    "moe": lambda: (UpcycledQwenMoeForCausalLM, UpcycledQwenMoeConfig(**SHAPE, num_experts=4)),
    "moe, sliding": lambda: (UpcycledQwenMoeForCausalLM, UpcycledQwenMoeConfig(**SHAPE, num_experts=4, **SLIDING)),
    "qwen2": lambda: (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3, sliding": lambda: (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8, **SLIDING)),
}
# Those of one token, of many windows, and of more than what is left of a block.
DOCUMENT_LENGTHS = (5, 70, 20, 33, 1, 40, 60, 27)


def _model(name, attn_implementation):
    torch.manual_seed(0)
    model_class, config = MODELS[name]()
    # As the Trainer sets it: with a cache, positions mean the place in the cache.
    config.use_cache = False
    return model_class._from_config(config, attn_implementation=attn_implementation).eval()


@pytest.fixture(scope="module")
def blocks():
    """Two blocks of 128 tokens; the fifth document is in both."""
    generator = torch.Generator().manual_seed(0)
    packer = BlockPacker(128, document_mask=True)
    documents = [torch.randint(1, 384, (length,), generator=generator).tolist() for length in DOCUMENT_LENGTHS]
    packed = [block for document in documents for block, _ in packer.add(document)]
    assert len(packed) == 2
    return packed


def _parts(batch):
    """Yield row, begin and end of what a batch holds of each document."""
    for row, positions in enumerate(batch["position_ids"]):
        starts = (positions == 0).nonzero().flatten().tolist()
        yield from ((row, begin, end) for begin, end in zip(starts, [*starts[1:], 128], strict=True))


def test_positions_start_anew_with_each_document_and_each_block(blocks):
    batch = collate_blocks(blocks)

    lengths = [end - begin for _, begin, end in _parts(batch)]
    assert lengths == [5, 70, 20, 33, 1, 40, 60, 27]
    is_first = batch["position_ids"] == 0
    assert (batch["labels"][is_first] == -100).all()
    assert torch.equal(batch["labels"][~is_first], batch["input_ids"][~is_first])
    assert count_targets(batch) == sum(DOCUMENT_LENGTHS) - len(DOCUMENT_LENGTHS)


def test_a_document_that_a_block_cuts_goes_on_from_position_zero():
    packed = [block for block, _ in BlockPacker(4, document_mask=True).add(range(9))]
    assert packed == [
        {"input_ids": [0, 1, 2, 3], "position_ids": [0, 1, 2, 3]},
        {"input_ids": [4, 5, 6, 7], "position_ids": [0, 1, 2, 3]},
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_documents_of_a_batch_of_blocks_do_not_see_each_other(blocks, name, attn_implementation):
    model, batch = _model(name, attn_implementation), collate_blocks(blocks)
    outputs = model(**batch)

    losses = []
    for row, begin, end in _parts(batch):
        tokens = batch["input_ids"][row : row + 1, begin:end]
        alone = model(input_ids=tokens, labels=tokens)
        torch.testing.assert_close(outputs.logits[row, begin:end], alone.logits[0], rtol=0, atol=1e-5)
        if end - begin > 1:
            losses.append(alone.loss * (end - begin - 1))
    torch.testing.assert_close(outputs.loss, sum(losses) / count_targets(batch))
    unmasked = model(input_ids=batch["input_ids"])
    assert (unmasked.logits - outputs.logits).abs().max() > 1e-2


def test_router_losses_count_every_token_of_a_packed_batch_once(blocks):
    model, batch = _model("moe", "sdpa").train(), collate_blocks(blocks)
    whole = model(**batch, num_items_in_batch=count_targets(batch), output_router_logits=True)

    expected = router_losses(model.config, whole.router_logits, whole.selected_experts)
    torch.testing.assert_close(whole.aux_loss, expected["aux_loss"].mean())
    assert whole.router_logits[0].shape == (256, 4)
    # The blocks of a step have other numbers of targets; their shares of the router losses add up to one.
    single = [collate_blocks([block]) for block in blocks]
    parts = [model(**part, num_items_in_batch=count_targets(batch)) for part in single]
    shares = [part.router_loss / (model.config.router_aux_loss_coef * part.aux_loss) for part in parts]
    torch.testing.assert_close(sum(shares), torch.tensor(1.0))
    torch.testing.assert_close(
        sum(part.loss - part.router_loss for part in parts), whole.loss - whole.router_loss, rtol=1e-5, atol=1e-5
    )


def _attention_by_bounds(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **kwargs):
    """What flash attention computes from the same arguments: the batch as one row, cut at the bounds."""
    assert attention_mask is None
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)
    assert torch.equal(kwargs["cu_seq_lens_k"], cu_seq_lens_q)
    assert max_length_q == kwargs["max_length_k"] == cu_seq_lens_q.diff().max()
    rows = [states.transpose(0, 1).flatten(1, 2).unsqueeze(0) for states in (query, key, value)]
    outputs = []
    for begin, end in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        part = (states[:, :, begin:end] for states in rows)
        outputs.append(sdpa_attention_forward(module, *part, None, scaling=kwargs["scaling"])[0])
    return torch.cat(outputs, dim=1).unflatten(1, (query.shape[0], -1)).flatten(0, 1), None


@torch.no_grad()
@pytest.mark.parametrize("name", ["moe", "qwen2"])
def test_flash_attention_is_given_the_bounds_of_documents_in_batches_of_many_blocks(blocks, name):
    AttentionInterface.register("attention_by_bounds", _attention_by_bounds)
    expected = _model(name, "sdpa")(**collate_blocks(blocks))
    given = _model(name, "attention_by_bounds")(**collate_blocks_for_flash_attention(blocks))

    torch.testing.assert_close(given.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(given.loss, expected.loss)


def test_only_flash_attention_needs_the_bounds(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert choose_collator("sdpa", args, True) is collate_blocks
    assert args.accelerator_config.dispatch_batches is None
    assert choose_collator("flash_attention_2", args, True) is collate_blocks_for_flash_attention
    # A first process that reads for all would cut the bounds as it cuts the batch.
    assert args.accelerator_config.dispatch_batches is False


def test_a_cache_from_which_attention_cannot_tell_documents_apart_is_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", use_cache=True)
    with pytest.raises(SettingsError, match="use_cache=true"):
        choose_collator("sdpa", args, True)
    assert choose_collator("sdpa", args, False) is collate_blocks


class _CountingStream:
    """Documents of one text, which counts how many were read."""

    def __init__(self, documents):
        self.documents, self.num_read = documents, 0

    def __iter__(self):
        for document in self.documents:
            self.num_read += 1
            yield document


def _documents(domain, texts):
    return _CountingStream([{"text": text, "domain": domain} for text in texts])


@pytest.mark.parametrize("max_blocks", [1, 3, None])
def test_each_domain_is_packed_as_if_alone(text_folder, tokenizer, max_blocks):
    files = sorted(map(str, text_folder.glob("*_validation.*")))
    found = blocks_by_domain(open_text(files), tokenizer, 64, max_blocks)

    assert sorted(found) == ["detective", "fiction", "travel"]
    for file, (_, blocks) in zip(files, sorted(found.items()), strict=True):
        assert blocks == list(pack_blocks(open_text([file]), tokenizer, 64))[:max_blocks]


def test_a_text_of_one_domain_is_read_no_further_than_it_takes(tokenizer):
    long, short = _documents("long", ["some words " * 20] * 1000), _documents("short", ["a few words"] * 5)
    documents = TextStream([TextSource("1", long, "long"), TextSource("2", short, "short")])
    found = blocks_by_domain(documents, tokenizer, 8, 2)

    assert [len(found[domain]) for domain in ("long", "short")] == [2, 2]
    assert long.num_read == 1
    assert short.num_read <= 5


def test_documents_that_name_their_domain_are_sorted_out(tmp_path, tokenizer):
    rows = [{"text": "words and words", "domain": domain} for domain in ("law", "law", "law", "art")]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = blocks_by_domain(open_text([str(file)]), tokenizer, 4, 1, document_mask=True)
    assert {domain: len(blocks) for domain, blocks in found.items()} == {"law": 1, "art": 1}
    assert found["law"][0]["position_ids"] == [0, 1, 2, 3]
