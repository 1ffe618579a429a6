"""Mixture-of-Experts models upcycled from dense Qwen checkpoints.

Attention, norms, rotary embedding and experts are Transformers' own; what differs is here: the router, the block that
joins it to the experts, and the losses that keep it balanced.

Dimensions: B batch, S sequence, T = B * S tokens, H hidden size, E experts, K slots of a token, L MoE layers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .chunked_loss_upcycled_moe import chunked_causal_lm_loss
from .configuration_upcycled_moe import UpcycledQwenMoeConfig
from .losses_upcycled_moe import ROUTER_LOSSES, router_losses
from .routers_upcycled_moe import ROUTERS, LinearRouter, Router
from .selection_upcycled_moe import SELECTIONS, ExpertSelector, log_scores


logger = logging.get_logger(__name__)


@dataclass
class UpcycledQwenMoeModelOutputWithPast(MoeModelOutputWithPast):
    """Outputs of [`UpcycledQwenMoeModel`]; those not listed here are Transformers' own.

    Args:
        router_logits (`tuple[torch.FloatTensor]`): With `output_router_logits`, one [T, E] for each MoE layer.
        selected_experts (`tuple[torch.LongTensor]`):
            With `output_selected_experts`, one tensor [T, K] for each MoE layer; E in an empty slot.
    """

    selected_experts: tuple[torch.LongTensor, ...] | None = None


@dataclass
class UpcycledQwenMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Outputs of [`UpcycledQwenMoeForCausalLM`]; those not listed here are Transformers' own.

    Args:
        aux_loss (`torch.FloatTensor` of shape `()`): Load-balancing loss, mean over MoE layers, not weighted.
        z_loss (`torch.FloatTensor` of shape `()`): Router z-loss, mean over MoE layers, not weighted.
        entropy_loss, locality_loss (`torch.FloatTensor` of shape `()`): The same of those, if they have a weight.
        router_loss (`torch.FloatTensor` of shape `()`): What all add to `loss`; `loss - router_loss` is the rest.
        layer_router_losses (`dict[str, torch.FloatTensor]`):
            The losses above of each MoE layer [L] by the same names, not weighted and without gradient.
        router_logits (`tuple[torch.FloatTensor]`): One tensor [T, E] for each MoE layer.
        selected_experts (`tuple[torch.LongTensor]`): One tensor [T, K] for each MoE layer; E in an empty slot.
    """

    z_loss: torch.FloatTensor | None = None
    entropy_loss: torch.FloatTensor | None = None
    locality_loss: torch.FloatTensor | None = None
    router_loss: torch.FloatTensor | None = None
    layer_router_losses: dict[str, torch.FloatTensor] | None = None
    selected_experts: tuple[torch.LongTensor, ...] | None = None


@dataclass
class UpcycledQwenMoeSequenceClassifierOutputWithPast(SequenceClassifierOutputWithPast):
    """Outputs of [`UpcycledQwenMoeForSequenceClassification`]: a classifier's, and the router's as above."""

    aux_loss: torch.FloatTensor | None = None
    z_loss: torch.FloatTensor | None = None
    entropy_loss: torch.FloatTensor | None = None
    locality_loss: torch.FloatTensor | None = None
    router_loss: torch.FloatTensor | None = None
    layer_router_losses: dict[str, torch.FloatTensor] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    selected_experts: tuple[torch.LongTensor, ...] | None = None


@use_experts_implementation
class UpcycledQwenMoeExperts(Qwen2MoeExperts):
    """Routed experts, fused: `gate_up_proj` [E, 2 * moe_intermediate_size, H], `down_proj` [E, H, ...].

    Declared here because Transformers looks for the decorator's name in the file of the pretrained model, and
    otherwise falls back to the eager implementation without a word.
    """


class UpcycledQwenMoeConstantExperts(nn.Module):
    """Experts that return `a_1 x + a_2 v` for a token x, with a vector v of their own and `a = softmax(W x)`.

    Source: MoE++ (arXiv 2410.07348), its constant experts.
    """

    def __init__(self, config: UpcycledQwenMoeConfig):
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(config.num_constant_experts, config.hidden_size))  # [C, H]
        self.weight = nn.Parameter(torch.empty(config.num_constant_experts, 2, config.hidden_size))  # [C, 2, H]

    def forward(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the sum [T, H] over the experts, with the weights [T, C]."""
        mixing = F.linear(tokens, self.weight.flatten(0, 1)).unflatten(-1, (-1, 2))  # [T, C, 2]
        mixing = F.softmax(mixing, dim=-1, dtype=torch.float).to(tokens.dtype) * weights.unsqueeze(-1)
        return mixing[..., 0].sum(dim=-1, keepdim=True) * tokens + mixing[..., 1] @ self.vectors


class UpcycledQwenMoeSparseMoeBlock(nn.Module):
    """A router, the experts that it sends a token to, and one that sees every token, if the configuration has it."""

    def __init__(self, config: UpcycledQwenMoeConfig):
        super().__init__()
        self.config = config
        self.gate = ROUTERS[config.router_type](config)
        self.experts = UpcycledQwenMoeExperts(config)
        self.constant_experts = None
        if config.num_constant_experts > 0:
            self.constant_experts = UpcycledQwenMoeConstantExperts(config)
        self.shared_expert = None
        if config.shared_expert_intermediate_size > 0:
            self.shared_expert = Qwen2MoeMLP(config, intermediate_size=config.shared_expert_intermediate_size)
            if config.shared_expert_gating == "sigmoid":
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        router_logits, weights, index = self.gate(tokens)
        if self._may_have_empty_slots():
            output = self._filled_slots(tokens, weights, index) + self._without_computation(tokens, weights, index)
        else:
            output = self._compute_experts(tokens, index, weights)
        if self.shared_expert is not None:
            output = output + self.shared_weight(tokens, router_logits) * self.shared_expert(tokens)
        return output.reshape(hidden_states.shape)

    def _compute_experts(self, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the output [T, H] of the experts with computation, in autocast's type where that is enabled.

        Autocast itself passes over the grouped product, which would run in the type of the weights.
        """
        device_type = tokens.device.type
        # Adapters hold the weights in a module of their own, and offloading, which replaces `forward`, brings them in
        # at the call.
        own, is_offloaded = self.experts._parameters, "forward" in vars(self.experts)
        if not torch.is_autocast_enabled(device_type) or not own or is_offloaded:
            return self.experts(tokens, index, weights)
        dtype = torch.get_autocast_dtype(device_type)
        parameters = {name: parameter.to(dtype) for name, parameter in own.items()}
        return functional_call(self.experts, parameters, (tokens.to(dtype), index, weights))

    def _may_have_empty_slots(self) -> bool:
        """As the configuration says, but for expert choice in evaluation mode."""
        config = self.config
        if not self.training and SELECTIONS[config.router_selection].in_evaluation is not None:
            return False
        return config.has_empty_slots

    def _filled_slots(self, tokens: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the output [T, H] of the experts with computation, where tokens have fewer than K of them.

        Only pairs of a token and such an expert are computed. A compiled graph knows no sizes that depend on data:
        there every slot is, those of no expert with weight zero.
        """
        is_filled = index < self.config.num_experts
        index, weights = index.masked_fill(~is_filled, 0), weights.masked_fill(~is_filled, 0.0)
        if is_torchdynamo_compiling():
            return self._compute_experts(tokens, index, weights)
        # One pair at least, with weight zero, so that the experts always have gradients: DDP waits for them.
        is_filled[:1, :1] |= ~is_filled.any()
        token, slot = is_filled.nonzero(as_tuple=True)
        outputs = self._compute_experts(tokens[token], index[token, slot, None], weights[token, slot, None])
        return outputs.new_zeros(tokens.shape).index_add(0, token, outputs)

    def _without_computation(
        self, tokens: torch.Tensor, weights: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor | float:
        """Return the output [T, H] of the zero, copy and constant experts, which follow the others in this order."""
        config, output = self.config, 0.0
        first_copy = config.num_experts + config.num_zero_experts
        first_constant = first_copy + config.num_copy_experts
        if config.num_copy_experts > 0:
            is_copy = (index >= first_copy) & (index < first_constant)
            output = (weights * is_copy).sum(dim=-1, keepdim=True) * tokens
        if self.constant_experts is not None:
            constants = torch.arange(first_constant, config.num_routed_experts, device=index.device)
            constant_weights = (weights.unsqueeze(-1) * (index.unsqueeze(-1) == constants)).sum(dim=1)  # [T, C]
            output = output + self.constant_experts(tokens, constant_weights)
        return output

    def shared_weight(self, tokens: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor | float:
        """Return the weight [T, 1] of the shared expert."""
        if self.config.shared_expert_gating == "plain":
            return 1.0
        if self.config.shared_expert_gating == "sigmoid":
            return F.sigmoid(self.shared_expert_gate(tokens))
        # From the logits: under expert parallelism a process has the weights of its own experts only.
        highest = log_scores(router_logits, self.config).amax(dim=-1, keepdim=True)
        return -torch.expm1(highest).to(tokens.dtype)


ATTENTION_CLASSES = {"qwen2": Qwen2Attention, "qwen3": Qwen3Attention}


class UpcycledQwenMoeDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: UpcycledQwenMoeConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ATTENTION_CLASSES[config.base_model_type](config, layer_idx)
        self.mlp = UpcycledQwenMoeSparseMoeBlock(config) if config.is_moe_layer(layer_idx) else Qwen2MoeMLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attention_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class UpcycledQwenMoePreTrainedModel(PreTrainedModel):
    config: UpcycledQwenMoeConfig
    config_class = UpcycledQwenMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UpcycledQwenMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(Router, index=0),
        "selected_experts": OutputRecorder(ExpertSelector, index=1),
        "hidden_states": UpcycledQwenMoeDecoderLayer,
        "attentions": [OutputRecorder(attention, index=1) for attention in ATTENTION_CLASSES.values()],
    }

    # Node that this process is on, for the locality loss; a trainer sets it.
    expert_node = 0

    def __init__(self, config: UpcycledQwenMoeConfig, *args, **kwargs):
        # Fields may have been set one by one since it was made, as `from_pretrained` sets its keyword arguments.
        config.validate()
        super().__init__(config, *args, **kwargs)
        if config.use_router_bias:
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]
        if config.router_dtype == "float32":
            # A pattern that is searched for: `mlp.gate` would also match `mlp.gate_proj`.
            self._keep_in_fp32_modules_strict = [r"\.mlp\.gate\."]

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Do nothing: the configuration names the code of all four classes and saves it."""

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, UpcycledQwenMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, UpcycledQwenMoeConstantExperts):
            init.normal_(module.vectors, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Router):
            module.reset_parameters(std=self.config.initializer_range)
        elif isinstance(module, ExpertSelector) and self.config.use_router_bias:
            init.zeros_(module.e_score_correction_bias)

    @torch.no_grad()
    def fold_routers(self) -> "UpcycledQwenMoePreTrainedModel":
        """Replace every router by the linear one with the same logits, in place, and return the model.

        The folded model computes the same function at the cost of a linear router. Training it differs: the routers
        of a mixture are separate parameters.

        Raises:
            ValueError: if the routers do not fold (see `Router.fold_obstacle`).
        """
        blocks = self._moe_blocks()
        folded = [block.gate.fold() for block in blocks]
        self.config.use_linear_router()
        for block, weight in zip(blocks, folded, strict=True):
            router = LinearRouter(self.config).train(block.gate.training)
            # A router without parameters folds into what its block computes in.
            router.weight = nn.Parameter(
                weight.to(next(block.gate.parameters(), block.experts.down_proj)),
                requires_grad=any(parameter.requires_grad for parameter in block.gate.parameters()),
            )
            router.selector = block.gate.selector
            # Transformers installs the hooks that record router logits once: they move to the new router.
            router._forward_hooks.update(block.gate._forward_hooks)
            block.gate = router
        return self

    def _moe_blocks(self) -> list[UpcycledQwenMoeSparseMoeBlock]:
        """Return the MoE blocks, one for each MoE layer, in their order."""
        return [module for module in self.modules() if isinstance(module, UpcycledQwenMoeSparseMoeBlock)]

    @torch.no_grad()
    def update_router_biases(self, loads: torch.Tensor) -> None:
        """Move the selection biases towards balance, after a training step.

        Args:
            loads: how often each expert was selected in the step, by all processes [L, E].
        Raises:
            ValueError: if the routers have no bias, or there are loads of another number of layers.
        Source: Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), algorithm 1.
        """
        if not self.config.use_router_bias:
            raise ValueError("The routers have no bias to update; set use_router_bias=True.")
        blocks = self._moe_blocks()
        if len(blocks) != len(loads):
            raise ValueError(f"loads are of {len(loads)} layers, but the model has {len(blocks)} MoE layers.")
        for block, layer_loads in zip(blocks, loads, strict=True):
            # Adapters around a router that train a copy of it pass attributes on to the copy; others hold the router.
            selector = getattr(block.gate, "selector", None)
            if selector is None:
                selector = next(module for module in block.gate.modules() if isinstance(module, ExpertSelector))
            selector.update_bias(layer_loads)

    def _has_router_loss(self) -> bool:
        return any(getattr(self.config, coefficient) > 0 for coefficient in ROUTER_LOSSES.values())

    def _router_outputs(self, labels: torch.Tensor | None, output_router_logits: bool) -> dict[str, bool]:
        """Return what to record of the routers: all if it is asked for, or part of a training loss."""
        is_needed = output_router_logits or (self.training and labels is not None and self._has_router_loss())
        return {"output_router_logits": is_needed, "output_selected_experts": is_needed}

    def _router_losses(
        self, outputs: UpcycledQwenMoeModelOutputWithPast, attention_mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
        """Return the fields of the output that hold router losses; nothing if not needed.

        Raises:
            ValueError: if the routers are being trained but the losses cannot reach them.
        """
        if not outputs.router_logits:
            return {}
        if self.training and torch.is_grad_enabled() and self._has_router_loss():
            for block, logits in zip(self._moe_blocks(), outputs.router_logits, strict=True):
                if not logits.requires_grad and any(parameter.requires_grad for parameter in block.gate.parameters()):
                    raise ValueError(
                        "The router losses have no gradient: gradient checkpointing with use_reentrant=True cuts them "
                        "off. Use use_reentrant=False, or set the coefficients of the router losses to 0."
                    )
        by_layer = router_losses(
            self.config, outputs.router_logits, outputs.selected_experts, attention_mask, self.expert_node
        )
        losses = {name: layers.mean() for name, layers in by_layer.items()}
        losses["router_loss"] = sum(getattr(self.config, ROUTER_LOSSES[name]) * loss for name, loss in losses.items())
        losses["layer_router_losses"] = {name: layers.detach() for name, layers in by_layer.items()}
        return losses


class UpcycledQwenMoeModel(UpcycledQwenMoePreTrainedModel):
    def __init__(self, config: UpcycledQwenMoeConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [UpcycledQwenMoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UpcycledQwenMoeModelOutputWithPast:
        """Return the hidden states [B, S, H] after the last norm.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # `generate` may have prepared one mask for each layer type.
        if not isinstance(causal_masks := attention_mask, dict):
            mask_arguments = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                # Only those that a caller gives can tell documents apart; looking would wait for the device.
                "position_ids": position_ids,
            }
            causal_masks = {"full_attention": create_causal_mask(**mask_arguments)}
            if "sliding_attention" in self.config.layer_types:
                causal_masks["sliding_attention"] = create_sliding_window_causal_mask(**mask_arguments)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer_type, decoder_layer in zip(self.config.layer_types, self.layers, strict=True):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return UpcycledQwenMoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class UpcycledQwenMoeForCausalLM(UpcycledQwenMoePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = Qwen3MoeForCausalLM._tp_plan
    _pp_plan = Qwen3MoeForCausalLM._pp_plan
    _fsdp_plan = Qwen3MoeForCausalLM._fsdp_plan

    # What `forward` takes for its argument of this name where it is not given; a trainer sets it.
    loss_chunk_tokens: int | None = None

    def __init__(self, config: UpcycledQwenMoeConfig):
        super().__init__(config)
        self.model = UpcycledQwenMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_chunk_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UpcycledQwenMoeCausalLMOutputWithPast:
        """Return the logits [B, S, vocab_size] and, with `labels` [B, S], the language-modeling loss.

        In training mode, or with `output_router_logits`, the router losses are added to it.

        Args:
            loss_chunk_tokens: with `labels`, return no logits, and compute the loss from those of as many tokens at a
                time; the model's attribute of this name by default, 0 for all at once.
        Raises:
            ValueError: if `loss_chunk_tokens` is negative, or the model has another loss function than its own.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if loss_chunk_tokens is None:
            loss_chunk_tokens = self.loss_chunk_tokens or 0
        in_chunks = labels is not None and loss_chunk_tokens != 0
        if in_chunks:
            self._check_loss_in_chunks(loss_chunk_tokens, logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **self._router_outputs(labels, output_router_logits),
            **kwargs,
        )
        hidden_states, logits, loss = outputs.last_hidden_state, None, None
        if in_chunks:
            loss = chunked_causal_lm_loss(self.lm_head, hidden_states, labels, loss_chunk_tokens, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)

        losses = self._router_losses(outputs, attention_mask)
        if loss is not None and losses:
            losses["router_loss"] = losses["router_loss"] * _share_of_batch(labels, **kwargs)
            loss = loss + losses["router_loss"].to(loss.device)
        return UpcycledQwenMoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            selected_experts=outputs.selected_experts if output_router_logits else None,
            **losses,
        )

    def _check_loss_in_chunks(self, loss_chunk_tokens: int, logits_to_keep: int | torch.Tensor) -> None:
        if loss_chunk_tokens < 0:
            raise ValueError(f"loss_chunk_tokens={loss_chunk_tokens} is negative; 0 computes all logits at once.")
        if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
            raise ValueError("loss_chunk_tokens returns no logits; leave logits_to_keep or loss_chunk_tokens out.")
        if self.loss_function is not ForCausalLMLoss:
            raise ValueError("loss_chunk_tokens knows no other loss_function than the model's own; leave it out.")


def _share_of_batch(
    labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, shift_labels=None, **_
) -> torch.Tensor | float:
    """Return which part of the global batch's targets is in this micro-batch; 1 if nobody counted them.

    A trainer that passes `num_items_in_batch` sums the losses of micro-batches and processes. The language-modeling
    loss is divided by that number already; an unscaled router loss would be counted once for each of them.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    num_targets = (targets != -100).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(num_targets.device)
    return num_targets / num_items_in_batch


class UpcycledQwenMoeForSequenceClassification(UpcycledQwenMoePreTrainedModel):
    """Scores the last token that is not padding, e.g. as a reward model; keeps the router losses."""

    # The loss is a mean over sequences whatever `num_items_in_batch` says; Transformers' Trainer must not take it for
    # one that is divided by that number already, or it would sum the losses of accumulated micro-batches.
    accepts_loss_kwargs = False

    def __init__(self, config: UpcycledQwenMoeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = UpcycledQwenMoeModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UpcycledQwenMoeSequenceClassifierOutputWithPast:
        """Return the scores [B, num_labels] and, with `labels` [B], the loss with the router losses added as above.

        Raises:
            ValueError: for a batch of several sequences without `config.pad_token_id`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **self._router_outputs(labels, output_router_logits),
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        sequences = torch.arange(logits.shape[0], device=logits.device)
        pooled_logits = logits[sequences, self._last_token(input_ids, logits)]

        losses = self._router_losses(outputs, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled_logits, config=self.config)
            if losses:
                loss = loss + losses["router_loss"].to(loss.device)
        return UpcycledQwenMoeSequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            selected_experts=outputs.selected_experts if output_router_logits else None,
            **losses,
        )

    def _last_token(self, input_ids: torch.LongTensor | None, logits: torch.Tensor) -> torch.Tensor | int:
        """Return the position [B] of the last token that is not padding, whichever side the padding is on."""
        if self.config.pad_token_id is None and logits.shape[0] != 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined; set config.pad_token_id.")
        if self.config.pad_token_id is None:
            return -1
        if input_ids is None:
            logger.warning_once(
                f"{type(self).__name__} cannot see padding in inputs_embeds and scores the last position."
            )
            return -1
        is_token = (input_ids != self.config.pad_token_id).to(logits.device, torch.int32)
        positions = torch.arange(input_ids.shape[-1], device=logits.device, dtype=torch.int32)
        return (positions * is_token).argmax(-1)


__all__ = [
    "UpcycledQwenMoeForCausalLM",
    "UpcycledQwenMoeForSequenceClassification",
    "UpcycledQwenMoeModel",
    "UpcycledQwenMoePreTrainedModel",
]
