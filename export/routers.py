"""Routers as the one linear map that stock models have.

Dimensions: H hidden size, E experts.
"""

import torch

from ..common.moe_source import MoeSource
from ..common.settings import SettingsError
from ..common.streaming.contents import Computed, FileBytes
from ..common.streaming.planned import PlannedTensor


def router_tensor(source: MoeSource, layer_idx: int, name: str) -> PlannedTensor:
    """Return the router of MoE layer `layer_idx` as one weight [E, H]; a linear one is copied, any other folded."""
    if source.config.router_type == "linear":
        weight = source.tensors[f"model.layers.{layer_idx}.mlp.gate.weight"]
        return PlannedTensor(name, weight.dtype, weight.shape, FileBytes.whole(weight))
    shape = (source.config.num_experts, source.config.hidden_size)
    # Stored in float32 whatever the rest is: rounding the product to bfloat16 would change the experts of some tokens
    # even where the model is loaded in float32. In bfloat16 readers round it themselves.
    return PlannedTensor(name, "F32", shape, Computed(shape, folded_router, (source, layer_idx)))


def folded_router(source: MoeSource, layer_idx: int) -> torch.Tensor:
    """Return the weight [E, H], in float32, of the linear router with the logits of the one in layer `layer_idx`.

    Source: Router Upcycling (arXiv 2509.00679), equations 6 to 9: `Σ_r (W_r x)·k_e = x · (Σ_r W_r)ᵀ k_e`. That the sum
    over routers is linear in the token is our remark.

    Raises:
        SettingsError: if it is not finite.
    """
    weight = source.router(layer_idx).float().fold()
    if not weight.isfinite().all():
        raise SettingsError(
            f"{source.name}: the router of layer {layer_idx}, folded into one matrix, is not finite; look for NaN and "
            "very large values in its weights, and give a checkpoint from before they came."
        )
    return weight
