"""How experts start: from a layer's dense FFN to the fused tensors of its experts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .source import DTYPES, SourceTensor


@dataclass(frozen=True)
class FileBytes:
    """Content that is bytes of the source: `spans` of (tensor, first byte, bytes), all of it `repeats` times."""

    spans: tuple[tuple[SourceTensor, int, int], ...]
    repeats: int = 1

    @classmethod
    def whole(cls, *tensors: SourceTensor, repeats: int = 1) -> "FileBytes":
        """Return all bytes of `tensors`, one after the other."""
        return cls(tuple((tensor, 0, tensor.num_bytes) for tensor in tensors), repeats)

    def load(self) -> Tensor:
        """Return the content as one flat tensor."""
        parts = [
            tensor.load().view(-1).view(torch.uint8)[begin : begin + num_bytes]
            for tensor, begin, num_bytes in self.spans
        ]
        return torch.cat(parts * self.repeats).view(DTYPES[self.spans[0][0].dtype])


def copy_experts(layer: Mapping[str, SourceTensor], num_experts: int) -> dict[str, FileBytes]:
    """Return the content of the fused expert tensors when every expert is a copy of the dense FFN.

    `gate_up_proj` [E, 2I, H] is the gate and then the up projection, E times; `down_proj` [E, H, I] the down
    projection E times. Both are runs of the source's own bytes, so they stream.

    Source: Sparse Upcycling (arXiv 2212.05055); Router Upcycling (arXiv 2509.00679), equation 3.
    """
    gate, up, down = (layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return {
        "gate_up_proj": FileBytes.whole(gate, up, repeats=num_experts),
        "down_proj": FileBytes.whole(down, repeats=num_experts),
    }


@dataclass(frozen=True)
class ExpertInitializer:
    """How experts start.

    Args:
        contents: from a layer's tensors and the number of experts to the content of its fused tensors.
        preserves_function: how well the MoE computes what its parent does while routing weights sum to one.
    """

    contents: Callable[[Mapping[str, SourceTensor], int], dict[str, FileBytes]]
    preserves_function: Literal["exact", "approximate", "none"]


EXPERTS = {"copy": ExpertInitializer(copy_experts, "exact")}
