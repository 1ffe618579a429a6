import copy
import math

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from upcycled_moe.common.blocks import collate_blocks
from upcycled_moe.common.perplexity import (
    DomainLoss,
    block_losses,
    domain_loss,
    losses_of_documents,
    measure_perplexity,
    separates_documents,
    target_bytes,
)


TEXTS = ("the of and to it was", "this is — that, naïve and short", "for with as have this from had 12 and it was the")


def packed(tokenizer, block_size):
    """Return the texts, each ended, as blocks that say where documents begin, and the pieces that blocks hold."""
    blocks, pieces = [{"input_ids": [], "position_ids": []}], []
    for text in TEXTS:
        tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
        while tokens:
            if len(blocks[-1]["input_ids"]) == block_size:
                blocks.append({"input_ids": [], "position_ids": []})
            piece = tokens[: block_size - len(blocks[-1]["input_ids"])]
            tokens = tokens[len(piece) :]
            blocks[-1]["input_ids"] += piece
            blocks[-1]["position_ids"] += range(len(piece))
            pieces.append((len(blocks) - 1, piece))
    return blocks, pieces


@torch.no_grad()
def piece_losses(model, piece):
    """Return the loss of each token of a piece but the first, read alone."""
    log_probabilities = model(torch.tensor([piece])).logits[0].double().log_softmax(-1)
    return [-log_probabilities[at, token].item() for at, token in enumerate(piece[1:])]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_loss_is_that_of_each_document_alone(model, tokenizer, batch_size):
    blocks, pieces = packed(tokenizer, block_size=11)
    assert len(blocks) > 3
    assert len(blocks[-1]["input_ids"]) < 11
    losses = [loss for _, piece in pieces for loss in piece_losses(model, piece)]
    found = measure_perplexity(model, tokenizer, {"prose": blocks}, batch_size)["prose"].mean()
    assert found.num_tokens == len(losses)
    assert found.num_blocks == len(blocks)
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def bloom():
    """A model that knows no positions: documents of a block see what stands before them."""
    return BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3))


def mamba():
    """A model with a state, which goes on from document to document."""
    return MambaForCausalLM(
        MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, initializer_range=0.3, use_conv_bias=False)
    )


class Qwen2WithoutPositions(Qwen2ForCausalLM):
    """Takes positions, and makes nothing of them."""

    def forward(self, input_ids, position_ids=None, use_cache=None):
        return super().forward(input_ids, use_cache=use_cache)


def qwen2():
    config = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2WithoutPositions(config)


@pytest.mark.parametrize("make", [bloom, mamba, qwen2])
def test_a_model_that_does_not_tell_documents_apart_reads_them_one_at_a_time(make, tokenizer):
    torch.manual_seed(0)
    other = make().eval()
    blocks, pieces = packed(tokenizer, block_size=11)
    assert not separates_documents(other, blocks[0]["input_ids"])
    losses = [loss for _, piece in pieces for loss in piece_losses(other, piece)]
    found = measure_perplexity(other, tokenizer, {"a": blocks}, 4, documents_alone=True)["a"].mean()
    assert (found.num_tokens, found.num_blocks) == (len(losses), len(blocks))
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_tells_documents_apart_is_seen_to(model, tokenizer, dtype):
    blocks, _ = packed(tokenizer, block_size=64)
    tokens = blocks[0]["input_ids"]
    assert separates_documents(copy.deepcopy(model).to(dtype), tokens)
    assert all(separates_documents(model, tokens[:length]) for length in (1, 2, 3))


def test_documents_alone_have_the_losses_of_those_in_blocks(model, tokenizer):
    blocks, _ = packed(tokenizer, block_size=11)
    packed_losses = measure_perplexity(model, tokenizer, {"a": blocks}, 4)["a"]
    alone = measure_perplexity(model, tokenizer, {"a": blocks}, 4, documents_alone=True)["a"]
    torch.testing.assert_close(alone.losses, packed_losses.losses, atol=1e-4, rtol=0)
    assert alone.counts.tolist() == packed_losses.counts.tolist()


def test_a_block_of_documents_of_one_token_has_no_targets(model):
    losses, counts = losses_of_documents(model, {"input_ids": [3, 4], "position_ids": [0, 0]})
    assert (losses.tolist(), counts.tolist()) == ([0.0], [0])


def test_every_domain_has_its_own_loss(model, tokenizer):
    blocks, _ = packed(tokenizer, block_size=11)
    found = measure_perplexity(model, tokenizer, {"a": blocks[:2], "b": blocks[2:]}, 4)
    assert found["a"].mean() == measure_perplexity(model, tokenizer, {"a": blocks[:2]}, 4)["a"].mean()
    assert found["a"].mean().loss != found["b"].mean().loss


def test_sums_over_blocks(model, tokenizer):
    blocks, pieces = packed(tokenizer, block_size=11)
    losses, counts = block_losses(model, collate_blocks(blocks[:2]))
    for number in range(2):
        expected = [loss for block, piece in pieces if block == number for loss in piece_losses(model, piece)]
        assert losses[number].item() == pytest.approx(sum(expected), abs=1e-4)
        assert counts[number].item() == len(expected)


def test_standard_error_over_blocks():
    # Loss (6 + 2 + 4) / 6 = 2; what blocks are off: 6 - 2 * 2, 2 - 2 * 1, 4 - 2 * 3.
    found = domain_loss(torch.tensor([6.0, 2.0, 4.0]), torch.tensor([2, 1, 3]), num_bytes=10)
    assert found.loss == pytest.approx(2)
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * (2**2 + 0**2 + 2**2)) / 6)
    assert domain_loss(torch.tensor([6.0]), torch.tensor([2]), 10).stderr is None


def test_the_error_is_that_of_a_mean_where_blocks_are_of_one_size():
    losses = torch.tensor([3.0, 5.0, 10.0, 2.0], dtype=torch.float64)
    found = domain_loss(losses, torch.full((4,), 2), num_bytes=10)
    assert found.stderr == pytest.approx((losses / 2).std().item() / math.sqrt(4))


def test_bytes_of_targets(tokenizer):
    blocks, pieces = packed(tokenizer, block_size=64)
    assert len(blocks) == 1
    # All but the first token of each text; the end of a text is no text.
    expected = sum(
        len(text.encode()) - len(tokenizer.decode(piece[:1]).encode())
        for text, (_, piece) in zip(TEXTS, pieces, strict=True)
    )
    assert target_bytes(tokenizer, blocks[0]) == expected


def test_bits_per_byte():
    loss = DomainLoss(loss=2.0, stderr=None, num_tokens=30, num_bytes=90, num_blocks=1)
    assert loss.bits_per_byte == pytest.approx(2 / math.log(2) / 3)
    assert DomainLoss(1000.0, None, 1, 1, 1).perplexity == math.inf
