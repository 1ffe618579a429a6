"""Figures of pairs of experts.

Dimensions: L MoE layers, C experts.
"""

import math

import torch


def cosines(products: torch.Tensor) -> torch.Tensor:
    """Return the cosines [..., C, C] that belong to scalar products; NaN where a vector is zero."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    # Rounding must not make a copy more alike than itself.
    return (products / (norms[..., :, None] * norms[..., None, :])).clamp(-1.0, 1.0)


def mean_of_pairs(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of `values` [..., C, C] over pairs of different experts [...]; NaN where there is none.

    Pairs of NaN are left out.
    """
    is_same = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    return values.masked_fill(is_same, math.nan).flatten(-2).nanmean(dim=-1)
