"""Mixture-of-Experts models upcycled from dense Qwen checkpoints.

Attention, norms, rotary embedding and experts are Transformers' own; what differs is here: the router, the block that
joins it to the experts, and the losses that keep it balanced.

Dimensions: B batch, S sequence, T = B * S tokens, H hidden size, E experts, K experts per token, L MoE layers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
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
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_upcycled_moe import UpcycledQwenMoeConfig
from .losses_upcycled_moe import load_balancing_losses, router_z_losses
from .routers_upcycled_moe import ROUTERS, LinearRouter, TopKRouter


logger = logging.get_logger(__name__)


@dataclass
class UpcycledQwenMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Outputs of [`UpcycledQwenMoeForCausalLM`]; those not listed here are Transformers' own.

    Args:
        aux_loss (`torch.FloatTensor` of shape `()`): Load-balancing loss, mean over MoE layers, not weighted.
        z_loss (`torch.FloatTensor` of shape `()`): Router z-loss, mean over MoE layers, not weighted.
        router_loss (`torch.FloatTensor` of shape `()`): What both add to `loss`; `loss - router_loss` is the rest.
        router_logits (`tuple[torch.FloatTensor]`): One tensor [T, E] for each MoE layer.
    """

    z_loss: torch.FloatTensor | None = None
    router_loss: torch.FloatTensor | None = None


@dataclass
class UpcycledQwenMoeSequenceClassifierOutputWithPast(SequenceClassifierOutputWithPast):
    """Outputs of [`UpcycledQwenMoeForSequenceClassification`]: a classifier's, and the router's as above."""

    aux_loss: torch.FloatTensor | None = None
    z_loss: torch.FloatTensor | None = None
    router_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@use_experts_implementation
class UpcycledQwenMoeExperts(Qwen2MoeExperts):
    """Routed experts, fused: `gate_up_proj` [E, 2 * moe_intermediate_size, H], `down_proj` [E, H, ...].

    Declared here because Transformers looks for the decorator's name in the file of the pretrained model, and
    otherwise falls back to the eager implementation without a word.
    """


class UpcycledQwenMoeSparseMoeBlock(nn.Module):
    def __init__(self, config: UpcycledQwenMoeConfig):
        super().__init__()
        self.gate = ROUTERS[config.router_type](config)
        self.experts = UpcycledQwenMoeExperts(config)
        self.shared_expert = None
        if config.shared_expert_intermediate_size > 0:
            self.shared_expert = Qwen2MoeMLP(config, intermediate_size=config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        _, top_k_weights, top_k_index = self.gate(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights)
        if self.shared_expert is not None:
            output = output + F.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        return output.reshape(hidden_states.shape)


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
        "router_logits": OutputRecorder(TopKRouter, index=0),
        "hidden_states": UpcycledQwenMoeDecoderLayer,
        "attentions": [OutputRecorder(attention, index=1) for attention in ATTENTION_CLASSES.values()],
    }

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Do nothing: the configuration names the code of all four classes and saves it."""

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, UpcycledQwenMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, TopKRouter):
            module.reset_parameters(std=self.config.initializer_range)

    @torch.no_grad()
    def fold_routers(self) -> "UpcycledQwenMoePreTrainedModel":
        """Replace every router by the linear one with the same logits, in place, and return the model.

        The folded model computes the same function at the cost of a linear router. Training it differs: the routers
        of a mixture are separate parameters.

        Raises:
            ValueError: if the routers do not fold (`router_pooling="max"`, or several keys an expert).
        """
        blocks = self._moe_blocks()
        folded = [block.gate.fold() for block in blocks]
        self.config.use_linear_router()
        for block, weight in zip(blocks, folded, strict=True):
            router = LinearRouter(self.config).train(block.gate.training)
            router.weight = nn.Parameter(weight)
            # Transformers installs the hooks that record router logits once: they move to the new router.
            router._forward_hooks.update(block.gate._forward_hooks)
            block.gate = router
        return self

    def _moe_blocks(self) -> list[UpcycledQwenMoeSparseMoeBlock]:
        """Return the MoE blocks, one for each MoE layer, in their order."""
        return [module for module in self.modules() if isinstance(module, UpcycledQwenMoeSparseMoeBlock)]

    def _records_router_logits(self, labels: torch.Tensor | None, output_router_logits: bool) -> bool:
        """Whether the router losses are needed: asked for, or part of a training loss."""
        coefficients = (self.config.router_aux_loss_coef, self.config.router_z_loss_coef)
        return output_router_logits or (self.training and labels is not None and any(c > 0 for c in coefficients))

    def _router_losses(
        self, router_logits: tuple[torch.Tensor, ...] | None, attention_mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return `aux_loss`, `z_loss` and their weighted sum `router_loss`, or nothing without router logits.

        Raises:
            ValueError: if the routers are being trained but the losses cannot reach them.
        """
        if not router_logits:
            return {}
        coefficients = (self.config.router_aux_loss_coef, self.config.router_z_loss_coef)
        if self.training and torch.is_grad_enabled() and any(c > 0 for c in coefficients):
            for block, logits in zip(self._moe_blocks(), router_logits, strict=True):
                if not logits.requires_grad and any(parameter.requires_grad for parameter in block.gate.parameters()):
                    raise ValueError(
                        "The router losses have no gradient: gradient checkpointing with use_reentrant=True cuts them "
                        "off. Use use_reentrant=False, or set router_aux_loss_coef=0 and router_z_loss_coef=0."
                    )
        aux_loss = load_balancing_losses(router_logits, self.config.num_experts_per_tok, attention_mask).mean()
        z_loss = router_z_losses(router_logits, attention_mask).mean()
        router_loss = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
        return {"aux_loss": aux_loss, "z_loss": z_loss, "router_loss": router_loss}


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
    ) -> MoeModelOutputWithPast:
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
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        # `generate` may have prepared one mask for each layer type.
        if not isinstance(causal_masks := attention_mask, dict):
            mask_arguments = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            causal_masks = {"full_attention": create_causal_mask(**mask_arguments)}
            if "sliding_attention" in self.config.layer_types:
                causal_masks["sliding_attention"] = create_sliding_window_causal_mask(**mask_arguments)

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
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class UpcycledQwenMoeForCausalLM(UpcycledQwenMoePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = Qwen3MoeForCausalLM._tp_plan
    _pp_plan = Qwen3MoeForCausalLM._pp_plan
    _fsdp_plan = Qwen3MoeForCausalLM._fsdp_plan

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> UpcycledQwenMoeCausalLMOutputWithPast:
        """Return the logits [B, S, vocab_size] and, with `labels` [B, S], the language-modeling loss.

        In training mode, or with `output_router_logits`, the router losses are added to it.
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
            output_router_logits=self._records_router_logits(labels, output_router_logits),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        router_losses = self._router_losses(outputs.router_logits, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
            if router_losses:
                router_losses["router_loss"] = router_losses["router_loss"] * _share_of_batch(labels, **kwargs)
                loss = loss + router_losses["router_loss"].to(loss.device)
        return UpcycledQwenMoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            **router_losses,
        )


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
            output_router_logits=self._records_router_logits(labels, output_router_logits),
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        sequences = torch.arange(logits.shape[0], device=logits.device)
        pooled_logits = logits[sequences, self._last_token(input_ids, logits)]

        router_losses = self._router_losses(outputs.router_logits, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled_logits, config=self.config)
            if router_losses:
                loss = loss + router_losses["router_loss"].to(loss.device)
        return UpcycledQwenMoeSequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            **router_losses,
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
