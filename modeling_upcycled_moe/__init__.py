"""Upcycled Qwen Mixture-of-Experts models; importing this package registers them with Transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_upcycled_moe import UpcycledQwenMoeConfig
from .losses_upcycled_moe import ROUTER_LOSSES, router_losses
from .modeling_upcycled_moe import (
    UpcycledQwenMoeForCausalLM,
    UpcycledQwenMoeForSequenceClassification,
    UpcycledQwenMoeModel,
    UpcycledQwenMoePreTrainedModel,
)
from .routers_upcycled_moe import ROUTERS, GroupedAverageRouter, LinearRouter, MixtureRouter, MLPRouter, Router
from .selection_upcycled_moe import SELECTIONS, ExpertSelector, expert_counts


AutoConfig.register(UpcycledQwenMoeConfig.model_type, UpcycledQwenMoeConfig, exist_ok=True)
AutoModel.register(UpcycledQwenMoeConfig, UpcycledQwenMoeModel, exist_ok=True)
AutoModelForCausalLM.register(UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    UpcycledQwenMoeConfig, UpcycledQwenMoeForSequenceClassification, exist_ok=True
)

__all__ = [
    "ROUTERS",
    "ROUTER_LOSSES",
    "SELECTIONS",
    "ExpertSelector",
    "GroupedAverageRouter",
    "LinearRouter",
    "MLPRouter",
    "MixtureRouter",
    "Router",
    "UpcycledQwenMoeConfig",
    "UpcycledQwenMoeForCausalLM",
    "UpcycledQwenMoeForSequenceClassification",
    "UpcycledQwenMoeModel",
    "UpcycledQwenMoePreTrainedModel",
    "expert_counts",
    "router_losses",
]
