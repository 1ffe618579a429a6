"""What a measure is: sums over routed tokens, from which figures follow."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ...common.moe_layers import MoeLayer, RoutedTokens
from ..results import Figure, MeasureResult


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured.

    Args:
        layers: MoE layers of the checkpoint.
        domains: names of the domains, which the tokens name by number.
        device: of the model; sums may stay there.
        tokenizer: of the checkpoint, to write tokens as text.
        parent: dense checkpoint that the experts were copied from, a folder or Hub id, where it is known.
    """

    layers: Sequence[MoeLayer]
    domains: Sequence[str]
    device: torch.device
    tokenizer: PreTrainedTokenizerBase | None = None
    parent: str | None = None

    @property
    def num_experts(self) -> int:
        """E, the same in all layers."""
        return self.layers[0].num_experts


class Measure:
    """Follows the tokens of all MoE layers; its memory does not grow with their number.

    Attributes:
        name: its key in the report.
        figures: those of `MeasureResult.per_layer`, with their definitions.
    """

    name: str
    figures: tuple[Figure, ...] = ()

    def __init__(self, subject: Subject):
        self.subject = subject

    def update(self, number: int, tokens: RoutedTokens) -> None:
        """Add what MoE layer `number`, counted from 0, did with a batch; the default looks at no token."""

    def result(self) -> MeasureResult:
        """Return the figures of all tokens so far."""
        raise NotImplementedError
