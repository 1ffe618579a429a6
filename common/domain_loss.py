"""How well a model predicts the text of a domain, in numbers."""

import math
from dataclasses import dataclass

from .numbers import perplexity


@dataclass(frozen=True)
class DomainLoss:
    """How well a checkpoint predicts the text of a domain.

    Args:
        loss: mean over all targets, in nats.
        stderr: of the loss, over blocks; None with a single one.
        num_tokens: targets: all tokens but the first of each piece of a document in a block.
        num_bytes: of text in them, in UTF-8.
    """

    loss: float
    stderr: float | None
    num_tokens: int
    num_bytes: int
    num_blocks: int

    @property
    def perplexity(self) -> float:
        """Return `exp(loss)`, per token: comparable between checkpoints of one tokenizer."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Return the loss of all targets in bits, per byte of their text: comparable between tokenizers."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes if self.num_bytes else None
