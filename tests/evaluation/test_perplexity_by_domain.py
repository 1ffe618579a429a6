import math

import pytest
import torch

from upcycled_moe.common.blocks import collate_blocks
from upcycled_moe.evaluation.perplexity import block_losses, domain_loss, measure_perplexity, target_bytes
from upcycled_moe.evaluation.results import DomainLoss


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
    found = measure_perplexity(model, tokenizer, {"prose": blocks}, batch_size)["prose"]
    assert found.num_tokens == len(losses)
    assert found.num_blocks == len(blocks)
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_every_domain_has_its_own_loss(model, tokenizer):
    blocks, _ = packed(tokenizer, block_size=11)
    found = measure_perplexity(model, tokenizer, {"a": blocks[:2], "b": blocks[2:]}, 4)
    assert found["a"] == measure_perplexity(model, tokenizer, {"a": blocks[:2]}, 4)["a"]
    assert found["a"].loss != found["b"].loss


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
