"""What the sources of a group of weights count, as numbers that an optimizer moves.

Dimensions: K sources, F of them fixed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..settings import SettingsError


class SoftmaxCoefficients(nn.Module):
    """Coefficients `c = (f, (1 - Σ f) softmax(a))` [K] of sources, of which the first have fixed shares f [F].

    Args:
        initial: the shares [K - F] of the other sources among themselves to start from, above zero; they are scaled to
            sum to one.
        fixed: the shares f [F], at least zero, with a sum of at most one.

    Raises:
        SettingsError: if shares are not that.
    Source: XFT (arXiv 2404.15247), its learnable merging: `a` by a softmax, and λ, the share of the shared expert,
        fixed. UMM-RM (arXiv 2512.00724) and TPMM-DPO (arXiv 2605.23398) say that weights are learned, and not how; the
        same for them is our reading.
    """

    def __init__(self, initial: Sequence[float], fixed: Sequence[float] = ()):
        super().__init__()
        if not initial or min(initial) <= 0:
            raise SettingsError(f"initial coefficients {list(initial)} must all be above zero: a softmax never is.")
        if any(share < 0 for share in fixed) or sum(fixed) > 1:
            raise SettingsError(f"fixed shares {list(fixed)} must be at least 0 and sum to at most 1.")
        shares = torch.tensor(initial, dtype=torch.float32)
        self.register_buffer("fixed", torch.tensor(fixed, dtype=torch.float32))  # [F]
        self.logits = nn.Parameter((shares / shares.sum()).log())  # a [K - F]

    def forward(self) -> Tensor:
        """Return c [K]."""
        return torch.cat([self.fixed, (1 - self.fixed.sum()) * self.logits.softmax(dim=0)])
