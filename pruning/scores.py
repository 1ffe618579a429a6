"""How much each expert is worth, from one pass of the model over text.

Dimensions: L MoE layers, T tokens, N of them that an expert has, H hidden size, E experts to choose from, C of them
with weights of their own, K slots of a token.

A score is a class that follows a pass (see `RoutingObserver`) and an entry in `SCORES`. Each is a sum over tokens:
what it holds does not grow with the text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from modeling_upcycled_moe.selection_upcycled_moe import expert_counts, sum_dtype

from ..common.moe_layers import MoeLayer, RoutedTokens


class RoutedExpert(NamedTuple):
    """What an expert does with the tokens of a batch that are sent to it.

    Args:
        expert: from 0 to C - 1.
        token: numbers of its tokens in the batch [N].
        weights: what its outputs are multiplied with [N].
        outputs: before that [N, H].
    """

    expert: int
    token: Tensor
    weights: Tensor
    outputs: Tensor

    @property
    def norms(self) -> Tensor:
        """Norm [N] of what it adds to each token."""
        return self.weights.float() * self.outputs.float().norm(dim=-1)


def routed_experts(layer: MoeLayer, tokens: RoutedTokens) -> Iterator[RoutedExpert]:
    """Yield the experts with weights that got tokens; each computes its own tokens only."""
    for expert in range(layer.num_computed_experts):
        token, slot = (tokens.selected == expert).nonzero(as_tuple=True)
        if len(token):
            outputs = layer.expert_output(expert, tokens.hidden_states[token])
            yield RoutedExpert(expert, token, tokens.weights[token, slot], outputs)


class ExpertScore:
    """Follows a pass of `model`, whose MoE layers are `layers`."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer]):
        self.model = model
        self.layers = layers
        shape = (len(layers), layers[0].num_computed_experts)
        self._sums = torch.zeros(shape, dtype=sum_dtype(model.device), device=model.device)  # [L, C]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hold during the pass."""
        yield

    def update(self, number: int, tokens: RoutedTokens) -> None:
        """Add what MoE layer `number`, counted from 0, did with a batch."""
        raise NotImplementedError

    def scores(self) -> Tensor:
        """Return the score of each expert [L, C], on the CPU in float64; 0 if it got no token."""
        return self._sums.cpu().double()


class Frequency(ExpertScore):
    """The share of a layer's selections that are of this expert.

    Source: the usual baseline, e.g. of REAP (arXiv 2510.13999); the usage frequency of M-SMoE (arXiv 2310.01334).
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer]):
        super().__init__(model, layers)
        self._num_selections = self._sums.new_zeros(len(layers), 1)

    def update(self, number: int, tokens: RoutedTokens) -> None:
        counts = expert_counts(tokens.selected, tokens.router_logits.shape[-1])  # [E]
        self._sums[number] += counts[: self._sums.shape[1]]
        self._num_selections[number] += counts.sum()

    def scores(self) -> Tensor:
        return (self._sums / self._num_selections).cpu().double()


class Reap(ExpertScore):
    """`S_e = 1/|X_e| Σ_{x in X_e} g_e(x) ‖f_e(x)‖₂` over the tokens X_e that are sent to expert e.

    `g_e` is the weight that the model multiplies with, scaled over the selected experts where the model does that.

    Source: REAP (arXiv 2510.13999), equation 9.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer]):
        super().__init__(model, layers)
        self._num_tokens = torch.zeros_like(self._sums)  # [L, C]

    def update(self, number: int, tokens: RoutedTokens) -> None:
        for routed in routed_experts(self.layers[number], tokens):
            self._sums[number, routed.expert] += routed.norms.to(self._sums).sum()
            self._num_tokens[number, routed.expert] += len(routed.token)

    def scores(self) -> Tensor:
        return (self._sums / self._num_tokens.clamp(min=1)).cpu().double()


class EasyEp(ExpertScore):
    """`I_e = Σ_t s_t g_e(t) ‖f_e(t)‖₂`, with `s_t = max(0, 1 − cos(h_t, h_t + Σ_e g_e(t) f_e(t)))`.

    The sum is over the tokens that are sent to the expert; `h_t` is the residual stream before the MoE layer, to which
    its output is added, so that `s_t` says how far the routed experts turn a token.

    The published code has this `s_t`: it leaves out the shared expert, and negative values. That experts without
    computation are left out like the shared one is our reading.

    Source: EASY-EP (arXiv 2504.06792), its output-aware expert importance and expert-level token contribution.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer]):
        super().__init__(model, layers)
        self._residual = torch.empty(0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Note the residual stream before each MoE layer, which the norm before the layer is the first to read."""
        decoder_layers = self.model.base_model.layers
        with ExitStack() as stack:
            for layer in self.layers:
                norm = decoder_layers[layer.index].post_attention_layernorm
                stack.callback(norm.register_forward_pre_hook(self._note).remove)
            yield

    def _note(self, _, inputs: tuple[Tensor, ...]) -> None:
        self._residual = inputs[0].reshape(-1, inputs[0].shape[-1])  # [T, H]

    def update(self, number: int, tokens: RoutedTokens) -> None:
        change = torch.zeros_like(self._residual, dtype=torch.float)  # [T, H]
        norms = []
        for routed in routed_experts(self.layers[number], tokens):
            change.index_add_(0, routed.token, routed.weights.float()[:, None] * routed.outputs.float())
            norms.append((routed.expert, routed.token, routed.norms))
        # The angles are small: their cosines differ from one in digits that float32 does not have.
        before = self._residual.to(self._sums.dtype)
        contribution = (1 - F.cosine_similarity(before, before + change, dim=-1)).clamp(min=0)  # [T]
        for expert, token, values in norms:
            self._sums[number, expert] += (contribution[token] * values).sum()


class LogitSimilarity(ExpertScore):
    """The cosine of the router logits of two experts, each a vector over all tokens.

    Source: M-SMoE (arXiv 2310.01334), its similarity by router logits.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer]):
        super().__init__(model, layers)
        num_computed = self._sums.shape[1]
        self._products = self._sums.new_zeros(len(layers), num_computed, num_computed)  # [L, C, C]

    def update(self, number: int, tokens: RoutedTokens) -> None:
        logits = tokens.router_logits[:, : self._sums.shape[1]].to(self._products)
        self._products[number] += logits.T @ logits

    def scores(self) -> Tensor:
        """Return the cosines [L, C, C]; 0 for an expert whose logits are all zero."""
        norms = self._products.diagonal(dim1=1, dim2=2).sqrt()
        tiny = torch.finfo(norms.dtype).tiny
        return (self._products / (norms[:, :, None] * norms[:, None, :]).clamp(min=tiny)).cpu().double()


SCORES: dict[str, Callable[[PreTrainedModel, Sequence[MoeLayer]], ExpertScore]] = {
    "reap": Reap,
    "frequency": Frequency,
    "easy_ep": EasyEp,
    "merge": Frequency,
}
