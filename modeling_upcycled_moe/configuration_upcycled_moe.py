"""Configuration of a Mixture-of-Experts model upcycled from a dense Qwen checkpoint."""

import math
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from .losses_upcycled_moe import ROUTER_LOSSES
from .selection_upcycled_moe import SELECTIONS


if TYPE_CHECKING:
    # Saving the configuration copies the files named in its relative imports beside the weights; this one names the
    # modeling file, so that every checkpoint carries its code whichever class saved it.
    from .modeling_upcycled_moe import UpcycledQwenMoeForCausalLM  # noqa: F401


AUTO_MAP = {
    "AutoConfig": "configuration_upcycled_moe.UpcycledQwenMoeConfig",
    "AutoModel": "modeling_upcycled_moe.UpcycledQwenMoeModel",
    "AutoModelForCausalLM": "modeling_upcycled_moe.UpcycledQwenMoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_upcycled_moe.UpcycledQwenMoeForSequenceClassification",
}

# Fields that only one router type reads, and what they are when another one is used.
ROUTER_FIELDS = {
    "mixture": {"num_routers": None, "num_router_keys": None, "router_head_dim": None, "router_pooling": "sum"},
}

# Tensor-parallel styles of the shared expert are those of the dense MLP.
_SHARED_EXPERT_TP_PLAN = {
    f"layers.*.mlp.shared_expert.{name}": Qwen3MoeConfig.base_model_tp_plan[f"layers.*.mlp.{name}"]
    for name in ("gate_proj", "up_proj", "down_proj")
}


@strict
class UpcycledQwenMoeConfig(Qwen3Config):
    r"""Configuration of [`UpcycledQwenMoeModel`]: a dense Qwen decoder whose MLPs are mixtures of experts.

    Fields not listed here are those of [`Qwen3Config`] and mean the same.

    Args:
        base_model_type (`"qwen2"` or `"qwen3"`, defaults to `"qwen2"`):
            Model type of the dense parent, which settles the attention: `qwen2` (Qwen1.5, 2 and 2.5) has biases on
            the query, key and value projections, `qwen3` normalises queries and keys per head.
        attention_bias (`bool`, *optional*):
            Biases on the attention projections. Defaults to what the parent has: `True` for `qwen2`, where nothing
            else is possible, `False` for `qwen3`.
        head_dim (`int`, *optional*): Defaults to `hidden_size // num_attention_heads`.
        num_experts (`int`, defaults to 8): Routed experts in each MoE layer.
        num_experts_per_tok (`int`, defaults to 2): Experts that each token is sent to.
        moe_intermediate_size (`int`, *optional*): Width of a routed expert. Defaults to `intermediate_size`.
        shared_expert_intermediate_size (`int`, defaults to 0): Width of the expert that sees every token; 0 for none.
        shared_expert_gating (`"sigmoid"`, `"plain"` or `"complement"`, defaults to `"sigmoid"`):
            Weight of the shared expert: a learned sigmoid of the token (Qwen2-MoE), one (DeepSeekMoE), or what the
            highest routing probability leaves of one; the routed experts then share that probability (XFT).
        num_zero_experts (`int`, defaults to 0): Routed experts whose output is zero: a token can skip the layer.
        num_copy_experts (`int`, defaults to 0): Routed experts whose output is their input.
        num_constant_experts (`int`, defaults to 0):
            Routed experts whose output is `a_1 x + a_2 v`, with a learned vector `v` and `a = softmax(W x)`. These
            three kinds cost next to nothing and come after the `num_experts` others in a router's order (MoE++).
        decoder_sparse_step (`int`, defaults to 1): Every `decoder_sparse_step`-th layer is a MoE layer.
        mlp_only_layers (`list[int]`, *optional*): Layers that keep a dense MLP.
        norm_topk_prob (`bool`, defaults to `True`):
            Scale the weights of the selected experts to sum to one. With identical experts the model then equals its
            dense parent; stock Qwen MoE configurations default to `False`.
        router_type (`"linear"`, `"mixture"`, `"mlp"` or `"grouped_average"`, defaults to `"mixture"`):
            How a token is scored against the experts.
        num_routers (`int`, *optional*): Routers in a mixture. Defaults to `num_experts`.
        num_router_keys (`int`, *optional*):
            Keys of a mixture, a multiple of the experts, those without computation included; an expert's score is
            that of the best of its keys. Defaults to the larger of `num_routers` and the experts.
        router_head_dim (`int`, *optional*):
            Width of a router's query and of a key. Defaults to as many attention heads as each router can have:
            `ceil(num_attention_heads * head_dim / num_routers)`.
        router_pooling (`"sum"` or `"max"`, defaults to `"sum"`): How the routers of a mixture are pooled.
        router_dtype (`"float32"`, *optional*):
            Type that the routers compute in and that their weights are loaded in, whatever the rest of the model has,
            and under autocast. By default both are the model's, as in stock Qwen MoE models: a folded router then
            chooses in bfloat16 as the exported model does. Train in `"float32"`: near-ties flip in bfloat16, whose
            weights also lose small updates.
        router_score_function (`"softmax"` or `"sigmoid"`, defaults to `"softmax"`):
            From router logits to the scores that experts are selected and weighted by.
        router_selection (`str`, defaults to `"top_k"`):
            How the experts of a token follow from its scores.

            - `"top_k"`: the `num_experts_per_tok` best.
            - `"grouped_top_k"`: as many from each of `num_expert_groups` groups of neighbours; weights as for
              `top_k` (Mixture of Grouped Experts).
            - `"prototype_top_k"`: the same, but every group is a router of its own, with a softmax and, under
              `norm_topk_prob`, weights that sum to `1 / num_expert_groups` (expert prototyping).
            - `"top_p"`: the best until their scores sum to `router_top_p`, at most `num_experts_per_tok`.
            - `"expert_choice"`: in training each expert takes its `T * num_experts_per_tok / num_experts` best tokens
              of the `T` in the batch, so that a token's experts depend on tokens after it: not causal. In evaluation
              mode, generation included, it is `top_k`.
        num_expert_groups (`int`, *optional*): Groups of the two grouped selections.
        router_top_p (`float`, *optional*): Sum of scores at which `top_p` stops.
        use_router_bias (`bool`, defaults to `False`):
            Add a bias to the scores by which experts are selected, though not to their weights. It is no parameter:
            after each training step `update_router_biases` moves it towards balanced loads.
        router_bias_update_rate (`float`, defaults to 0.001): How far a step moves the biases.
        router_jitter_noise (`float`, defaults to 0.0):
            In training, the router's input is multiplied by U(1 - noise, 1 + noise).
        output_router_logits (`bool`, defaults to `False`):
            Return the router logits, and add the router losses in evaluation mode too. In training mode the losses
            are added whenever their coefficient is above zero.
        router_aux_loss_coef (`float`, defaults to 0.001): Weight of the load-balancing loss.
        router_z_loss_coef (`float`, defaults to 0.0): Weight of the router z-loss.
        router_entropy_loss_coef (`float`, defaults to 0.0):
            Weight of the entropy of a token's routing probabilities, which keeps `top_p` from selecting more and more.
        router_locality_loss_coef (`float`, defaults to 0.0): Weight of the locality loss; needs `expert_nodes`.
        expert_nodes (`list[int]`, *optional*):
            Node that each expert is on. The locality loss draws tokens to the experts of the node that they are on.

    Raises:
        StrictDataclassError: if a field has the wrong type or a combination of fields is impossible.
        ValueError: if an unknown argument looks like a misspelt field; other unknown ones are kept, as everywhere
            in Transformers.
    """

    model_type = "upcycled_qwen_moe"
    attribute_map = {"num_local_experts": "num_experts"}
    _auto_class = "AutoConfig"

    # The styles change between Transformers releases: take those of the release that is installed.
    base_model_tp_plan = {**Qwen3MoeConfig.base_model_tp_plan, **_SHARED_EXPERT_TP_PLAN}
    base_model_ep_plan = dict(Qwen3MoeConfig.base_model_ep_plan)
    base_model_pp_plan = dict(Qwen3MoeConfig.base_model_pp_plan)

    base_model_type: Literal["qwen2", "qwen3"] = "qwen2"
    attention_bias: bool | None = None
    head_dim: int | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int = 0
    shared_expert_gating: Literal["sigmoid", "plain", "complement"] = "sigmoid"
    num_zero_experts: int = 0
    num_copy_experts: int = 0
    num_constant_experts: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    norm_topk_prob: bool = True
    router_type: Literal["linear", "mixture", "mlp", "grouped_average"] = "mixture"
    num_routers: int | None = None
    num_router_keys: int | None = None
    router_head_dim: int | None = None
    router_pooling: Literal["sum", "max"] = "sum"
    router_dtype: Literal["float32"] | None = None
    router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    router_selection: Literal["top_k", "grouped_top_k", "prototype_top_k", "top_p", "expert_choice"] = "top_k"
    num_expert_groups: int | None = None
    router_top_p: float | int | None = None
    use_router_bias: bool = False
    router_bias_update_rate: float | int = 0.001
    router_jitter_noise: float | int = 0.0
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.0
    router_entropy_loss_coef: float | int = 0.0
    router_locality_loss_coef: float | int = 0.0
    expert_nodes: list[int] | None = None

    def __post_init__(self, **kwargs):
        # Not among the fields of every Transformers model, which old checkpoints have more of (`tie_encoder_decoder`).
        names = {field.name for field in fields(self)} - {field.name for field in fields(PreTrainedConfig)}
        for name in kwargs.keys() - self.attribute_map.keys():
            if similar := get_close_matches(name, names, n=1, cutoff=0.85):
                raise ValueError(f"{type(self).__name__} has no field {name!r}; did you mean {similar[0]!r}?")
        if self.attention_bias is None:
            self.attention_bias = self.base_model_type == "qwen2"
        # Sizes that the validators below refuse must not fail here first, with a ZeroDivisionError.
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        if self.router_type == "mixture":
            if self.num_routers is None:
                self.num_routers = self.num_experts
            if self.num_router_keys is None:
                # Every expert owns as many; sizes that the validators refuse must not fail here first.
                num_experts = max(self.num_routed_experts, 1)
                self.num_router_keys = -(-max(self.num_routers, num_experts) // num_experts) * num_experts
            if self.router_head_dim is None:
                self.router_head_dim = -(-self.num_attention_heads * self.head_dim // max(self.num_routers, 1))
        # Transformers warns of rules that no parameter matches.
        absent = []
        if self.base_model_type == "qwen2":
            absent += [".q_norm", ".k_norm"]
        if self.shared_expert_intermediate_size == 0:
            absent += [".shared_expert."]
        if not self.mlp_only_layers and self.decoder_sparse_step == 1:
            absent += [".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj"]
        self.base_model_tp_plan = {
            pattern: style
            for pattern, style in type(self).base_model_tp_plan.items()
            if not any(name in pattern for name in absent)
        }
        if self.has_empty_slots and "ep_router" in self.base_model_ep_plan.values():
            # Before 5.20 Transformers renumbers what a router returns, and would take an empty slot for an expert.
            # Without a plan it refuses expert parallelism.
            self.base_model_ep_plan = None
        super().__post_init__(**kwargs)
        # A re-saved checkpoint must name all four classes, not only the one that saved it, and in its own files, also
        # where Transformers has put the Hub repository that it was loaded from before the names.
        self.auto_map = {**(getattr(self, "auto_map", None) or {}), **AUTO_MAP}

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Return whether decoder layer `layer_idx` (from 0) has experts, as in Qwen2-MoE and Qwen3-MoE."""
        return layer_idx not in self.mlp_only_layers and (layer_idx + 1) % self.decoder_sparse_step == 0

    def use_linear_router(self) -> None:
        """Turn into the configuration of the same model with linear routers."""
        for name, value in ROUTER_FIELDS.get(self.router_type, {}).items():
            setattr(self, name, value)
        self.router_type = "linear"

    @property
    def num_routed_experts(self) -> int:
        """Experts that a router chooses from: `num_experts`, and those without computation."""
        return self.num_experts + self.num_zero_experts + self.num_copy_experts + self.num_constant_experts

    @property
    def has_empty_slots(self) -> bool:
        """Whether a token may have fewer than `num_experts_per_tok` experts with computation."""
        return SELECTIONS[self.router_selection].leaves_empty_slots or self.num_routed_experts > self.num_experts

    @property
    def has_constant_weights(self) -> bool:
        """Whether a token's weights do not depend on its scores, so that only router losses teach the router."""
        num_competing = self.num_experts_per_tok
        if self.router_selection == "prototype_top_k":
            num_competing //= self.num_expert_groups
        # In training any number of experts may choose a token.
        is_chosen = SELECTIONS[self.router_selection].in_evaluation is not None
        is_constant = self.norm_topk_prob and num_competing == 1
        return is_constant and self.shared_expert_gating != "complement" and not is_chosen

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers that have experts."""
        return [layer_idx for layer_idx in range(self.num_hidden_layers) if self.is_moe_layer(layer_idx)]

    @property
    def _experts_text(self) -> str:
        """How errors name the experts that a router chooses from."""
        num_free = self.num_routed_experts - self.num_experts
        return f"num_experts={self.num_experts}" + f" and {num_free} without computation" * (num_free > 0)

    def validate_attention(self):
        """Part of `@strict` validation."""
        if self.num_attention_heads < 1 or self.num_key_value_heads < 1:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} and num_key_value_heads={self.num_key_value_heads} "
                "must be at least 1."
            )
        for name in ("hidden_size", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of dimensions.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.base_model_type == "qwen2" and not self.attention_bias:
            raise ValueError(
                "attention_bias=False is impossible with base_model_type='qwen2', whose attention always has biases; "
                "leave attention_bias out or use base_model_type='qwen3'."
            )
        unknown = sorted(set(self.layer_types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise ValueError(
                f"layer_types has {', '.join(unknown)}; Qwen layers are 'full_attention' or 'sliding_attention'."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1.")
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            raise ValueError(
                "layer_types has 'sliding_attention' layers but there is no sliding window; set "
                "use_sliding_window=True and sliding_window, or make every layer 'full_attention'."
            )

    def validate_experts(self):
        """Part of `@strict` validation."""
        if self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts} must be at least 1.")
        if self.num_experts_per_tok < 1:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} must be at least 1.")
        for name in ("num_zero_experts", "num_copy_experts", "num_constant_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; 0 means none.")
        if self.num_experts_per_tok > self.num_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds {self._experts_text}; lower it or add "
                "experts."
            )
        for name in ("intermediate_size", "moe_intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.shared_expert_intermediate_size < 0:
            raise ValueError(
                f"shared_expert_intermediate_size={self.shared_expert_intermediate_size} is negative; "
                "0 means no shared expert."
            )
        if self.shared_expert_gating != "sigmoid" and self.shared_expert_intermediate_size == 0:
            raise ValueError(
                f"shared_expert_gating={self.shared_expert_gating!r} has no meaning without a shared expert; leave it "
                "out or set shared_expert_intermediate_size."
            )
        if self.shared_expert_gating == "complement" and not (
            self.norm_topk_prob
            and self.router_score_function == "softmax"
            and self.router_selection == "top_k"
            and not self.use_router_bias
        ):
            raise ValueError(
                "shared_expert_gating='complement' settles all weights itself; it needs norm_topk_prob=True, "
                "router_score_function='softmax', router_selection='top_k' and no use_router_bias."
            )
        if self.decoder_sparse_step < 1:
            raise ValueError(
                f"decoder_sparse_step={self.decoder_sparse_step} must be at least 1, which gives every layer experts."
            )
        outside = [layer_idx for layer_idx in self.mlp_only_layers if not 0 <= layer_idx < self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"mlp_only_layers names {outside}, but layers run from 0 to {self.num_hidden_layers - 1}."
            )
        if not self.moe_layers:
            raise ValueError(
                f"No layer has experts with decoder_sparse_step={self.decoder_sparse_step}, "
                f"mlp_only_layers={self.mlp_only_layers} and num_hidden_layers={self.num_hidden_layers}; "
                "lower decoder_sparse_step or shorten mlp_only_layers."
            )

    def validate_router(self):
        """Part of `@strict` validation."""
        for router_type, unused in ROUTER_FIELDS.items():
            given = [name for name, value in unused.items() if getattr(self, name) != value]
            if given and router_type != self.router_type:
                raise ValueError(
                    f"router_type={self.router_type!r} does not use {', '.join(given)}; "
                    f"leave them out or set router_type={router_type!r}."
                )
        if self.router_type == "mixture":
            for name in ("num_routers", "num_router_keys", "router_head_dim"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
            if self.num_router_keys % self.num_routed_experts:
                raise ValueError(
                    f"num_router_keys={self.num_router_keys} is not a multiple of {self._experts_text}: every expert "
                    "owns the same number of keys."
                )
        if self.router_type == "grouped_average" and self.hidden_size % self.num_routed_experts:
            raise ValueError(
                f"router_type='grouped_average' averages equal parts of the token, one for each expert, but "
                f"{self._experts_text} does not divide hidden_size={self.hidden_size}."
            )
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(f"router_jitter_noise={self.router_jitter_noise} is outside [0, 1).")
        if not 0 <= self.router_bias_update_rate < math.inf:
            raise ValueError(f"router_bias_update_rate={self.router_bias_update_rate} is outside [0, inf).")

    def validate_selection(self):
        """Part of `@strict` validation."""
        selection = SELECTIONS[self.router_selection]
        if selection.is_grouped:
            self._validate_groups()
        elif self.num_expert_groups is not None:
            grouped = " or ".join(repr(name) for name, other in SELECTIONS.items() if other.is_grouped)
            raise ValueError(
                f"router_selection={self.router_selection!r} does not use num_expert_groups; leave it out or set "
                f"router_selection to {grouped}."
            )
        if self.router_selection == "top_p":
            if self.router_top_p is None or not 0 < self.router_top_p <= 1:
                raise ValueError(f"router_selection='top_p' needs router_top_p in (0, 1], not {self.router_top_p}.")
            if self.router_score_function != "softmax":
                raise ValueError(
                    "router_selection='top_p' adds up probabilities; use router_score_function='softmax'."
                )
        elif self.router_top_p is not None:
            raise ValueError(
                f"router_selection={self.router_selection!r} does not use router_top_p; leave it out or set "
                "router_selection='top_p'."
            )
        if self.use_router_bias and not selection.compares_within_token:
            raise ValueError(
                f"use_router_bias=True has no meaning with router_selection={self.router_selection!r}, which "
                "does not compare biased scores; leave it out."
            )
        if not self.use_router_bias and self.router_bias_update_rate != type(self).router_bias_update_rate:
            raise ValueError(
                f"router_bias_update_rate={self.router_bias_update_rate} has no meaning with use_router_bias=False; "
                "leave it out or set use_router_bias=True."
            )
        if self.num_routed_experts > self.num_experts and not selection.takes_free_experts:
            raise ValueError(
                f"num_zero_experts, num_copy_experts and num_constant_experts do not go with "
                f"router_selection={self.router_selection!r}; use 'top_k' or 'top_p'."
            )

    def _validate_groups(self):
        groups = self.num_expert_groups
        if groups is None or groups < 1:
            raise ValueError(f"router_selection={self.router_selection!r} needs num_expert_groups, at least 1.")
        for name in ("num_experts", "num_experts_per_tok"):
            if getattr(self, name) % groups:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a multiple of num_expert_groups={groups}: a token goes to "
                    "the same number of experts in every group."
                )

    def validate_losses(self):
        """Part of `@strict` validation."""
        for name in ROUTER_LOSSES.values():
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, inf); 0 turns the loss off.")
        if self.expert_nodes is None:
            if self.router_locality_loss_coef > 0:
                raise ValueError("router_locality_loss_coef needs expert_nodes, the node of each expert.")
        elif len(self.expert_nodes) != self.num_routed_experts or min(self.expert_nodes) < 0:
            raise ValueError(
                f"expert_nodes={self.expert_nodes} must name a node, from 0, for each of the "
                f"{self.num_routed_experts} experts."
            )


__all__ = ["AUTO_MAP", "UpcycledQwenMoeConfig"]
