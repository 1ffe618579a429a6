"""The MoE layers of a model, ours or one of Transformers' own, and what they do with the tokens of a batch.

Dimensions: B blocks, S their length, T = B * S tokens, H hidden size, E experts to choose from, C of them with weights
of their own, K slots of a token.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from modeling_upcycled_moe.selection_upcycled_moe import routing_log_probabilities

from .settings import SettingsError


_WAY_OUT = "give an upcycled model, or a mixtral, qwen2_moe, qwen3_moe or olmoe one."


@dataclass(frozen=True, eq=False)
class MoeLayer:
    """A router and its experts.

    Args:
        index: of the decoder layer in the model.
        gate: the router; it returns router logits [T, E], weights [T, K] and selected experts [T, K].
        experts: the experts with weights, fused: `gate_up_proj` [C, 2I, H] and `down_proj` [C, H, I].
        config: of the model.
    """

    index: int
    gate: nn.Module
    experts: nn.Module
    config: object

    @property
    def num_experts(self) -> int:
        """E; the last of them may be experts without computation."""
        return getattr(self.config, "num_routed_experts", self.num_computed_experts)

    @property
    def num_computed_experts(self) -> int:
        """C."""
        return self.experts.gate_up_proj.shape[0]

    @property
    def num_experts_per_tok(self) -> int:
        """Experts of a token as the configuration says; a selection may leave slots empty, or have more of them."""
        return self.config.num_experts_per_tok

    def log_probabilities(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Return the logarithms [T, E] of the router's scores, scaled to sum to one."""
        if hasattr(self.config, "router_score_function"):
            return routing_log_probabilities(router_logits, self.config)
        return F.log_softmax(router_logits, dim=-1, dtype=torch.float)

    def expert_output(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """Return the output [T, H] of one expert with weights for all `tokens` [T, H], by the model's own code."""
        index = torch.full((len(tokens), 1), expert, device=tokens.device)
        return self.experts(tokens, index, tokens.new_ones(len(tokens), 1))

    def expert_outputs(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the output [T, H] of each expert with weights for all `tokens` [T, H]."""
        for expert in range(self.num_computed_experts):
            yield self.expert_output(expert, tokens)


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """What one MoE layer did with a batch of blocks of one domain.

    Args:
        domain: number of the domain that all tokens belong to.
        input_ids: [B, S].
        position_ids: [B, S]; they begin anew with each document.
        hidden_states: input of router and experts [T, H].
        router_logits: [T, E].
        log_probabilities: logarithms of the scores, which sum to one [T, E].
        weights: what the outputs of the selected experts are multiplied with [T, K]; 0 in an empty slot.
        selected: the experts [T, K]; E in an empty slot.
    """

    domain: int
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    log_probabilities: torch.Tensor
    weights: torch.Tensor
    selected: torch.Tensor


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Return the MoE layers of `model` in their order.

    Known are the blocks of the upcycled models and of Transformers' Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE, and any
    built like them: a module with a router `gate`, and fused `experts`.

    Raises:
        SettingsError: if there is none.
    """
    layers = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        is_fused = isinstance(experts, nn.Module) and hasattr(experts, "gate_up_proj")
        if is_fused and isinstance(getattr(module, "gate", None), nn.Module):
            index = re.search(r"layers\.(\d+)\.", f"{name}.")
            layers.append(MoeLayer(int(index[1]) if index else len(layers), module.gate, experts, model.config))
    if not layers or not isinstance(getattr(model.config, "num_experts_per_tok", None), int):
        raise SettingsError(f"{model.config.model_type} models have no MoE layer that can be looked into; {_WAY_OUT}")
    return layers


@contextmanager
def observed(
    layers: list[MoeLayer], observe: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call `observe(number, hidden_states, router_logits, weights, selected)` at each forward pass of each router.

    At once, while the model runs, so that nothing need be kept for all layers. `number` counts the MoE layers from 0.

    Raises:
        SettingsError: at a forward pass, if a router returns something else.
    """

    def hook(number: int) -> Callable:
        def call(_, inputs, outputs):
            hidden_states = inputs[0].reshape(-1, inputs[0].shape[-1])
            _check_form(layers[number], len(hidden_states), outputs)
            observe(number, hidden_states, *outputs)

        return call

    handles = [layer.gate.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_routing(layer: MoeLayer, tokens: RoutedTokens) -> None:
    """Check that a router of `layer` weights its experts by the scores that the measures take it to have.

    Raises:
        SettingsError: if not.
    """
    if hasattr(layer.config, "router_score_function"):
        return  # the scores come from the model's own code
    chosen = tokens.log_probabilities.gather(-1, tokens.selected).softmax(dim=-1)  # [T, K]
    weights = tokens.weights.float() / tokens.weights.float().sum(dim=-1, keepdim=True)
    # Weights may be rounded to their type.
    if not torch.allclose(weights, chosen, rtol=0, atol=max(1e-5, 2 * torch.finfo(tokens.weights.dtype).eps)):
        raise SettingsError(
            f"{layer.config.model_type} models do not weight experts by the softmax of their router logits; {_WAY_OUT}"
        )


def _check_form(layer: MoeLayer, num_tokens: int, outputs: object) -> None:
    shapes = [tuple(getattr(output, "shape", ())) for output in outputs] if isinstance(outputs, tuple) else []
    if shapes[:1] != [(num_tokens, layer.num_experts)] or len(shapes) != 3 or len(set(shapes[1:])) != 1:
        raise SettingsError(
            f"the routers of {layer.config.model_type} models return something else than logits, weights and experts "
            f"of each token; {_WAY_OUT}"
        )
