"""What the sources of a group of weights count, as numbers that an optimizer moves.

Dimensions: K sources, F of them fixed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..settings import SettingsError


class SoftmaxCoefficients(nn.Module):
    """Coefficients `c = (f, (1 - Σ f) softmax(a))` [K] of sources, of which the first have fixed shares f [F].

    They are in float64: sources are often almost alike, and so the gradients of what they count, of which a softmax
    passes on the differences.

    Args:
        initial: the shares [K - F] of the other sources among themselves to start from, above zero; they are scaled to
            sum to one.
        fixed: the shares f [F], at least zero, with a sum below one.

    Raises:
        SettingsError: if shares are not that.
    Source: XFT (arXiv 2404.15247), its learnable merging: `a` by a softmax, and λ, the share of the shared expert,
        fixed. UMM-RM (arXiv 2512.00724) and TPMM-DPO (arXiv 2605.23398) say that weights are learned, and not how; the
        same for them is our reading.
    """

    def __init__(self, initial: Sequence[float], fixed: Sequence[float] = ()):
        super().__init__()
        if not initial or not all(0 < share < math.inf for share in initial):
            raise SettingsError(
                f"initial coefficients {list(initial)} must all be above zero: a softmax never is zero."
            )
        if not all(share >= 0 for share in fixed) or not sum(fixed) < 1:
            raise SettingsError(f"fixed shares {list(fixed)} must be at least 0 and sum to less than 1.")
        shares = torch.tensor(initial, dtype=torch.float64)
        self.register_buffer("fixed", torch.tensor(fixed, dtype=torch.float64))  # [F]
        self.logits = nn.Parameter((shares / shares.sum()).log().float())  # a [K - F]

    @property
    def num_fixed(self) -> int:
        """F."""
        return len(self.fixed)

    @property
    def num_sources(self) -> int:
        """K."""
        return self.num_fixed + len(self.logits)

    def forward(self) -> Tensor:
        """Return c [K], in float64."""
        return torch.cat([self.fixed, (1 - self.fixed.sum()) * self.logits.double().softmax(dim=0)])
