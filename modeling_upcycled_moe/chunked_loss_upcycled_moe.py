"""Language-modeling loss that never holds the logits of all tokens.

Dimensions: T tokens, C tokens of a chunk, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def chunked_causal_lm_loss(
    lm_head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    chunk_tokens: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """Return what Transformers' `ForCausalLMLoss` returns for the logits of `lm_head`, from `chunk_tokens` at a time.

    The gradients are formed together with the loss, one chunk after the other, so that each chunk's logits [C, V] are
    computed once and kept by nobody. A head that does more than multiply with its weight, such as one with adapters,
    or whose weight is sharded, computes its chunks twice instead: in the forward and in the backward pass.

    Args:
        lm_head: from hidden states [..., H] to logits [..., V].
        hidden_states: [batch, sequence, H].
        labels: [batch, sequence], the token at each position; `ignore_index` for none.
        chunk_tokens: C, at least 1.
        num_items_in_batch: what to divide the sum by; by default the number of targets.
        shift_labels: [batch, sequence], the token after each position; follows from `labels` by default.
    Source: gradients in the forward pass: Liger Kernel (arXiv 2410.10989), its FusedLinearCrossEntropy.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    tokens = hidden_states.flatten(0, -2)  # [T, H]
    targets = shift_labels.flatten().to(tokens.device)  # [T]
    if _only_multiplies(lm_head):
        needs_gradients = torch.is_grad_enabled() and (tokens.requires_grad or lm_head.weight.requires_grad)
        total = _SummedCrossEntropy.apply(tokens, lm_head.weight, targets, chunk_tokens, ignore_index, needs_gradients)
    else:
        total = _recomputed_sum(lm_head, tokens, targets, chunk_tokens, ignore_index)
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    count = torch.as_tensor(count, device=total.device)
    # Without any target the loss is not a number, and the gradients are zero.
    return (total / count.clamp(min=1)).masked_fill(count == 0, torch.nan)


def _only_multiplies(lm_head: nn.Module) -> bool:
    """Return whether the output of `lm_head` is that of its weight alone, and the weight is all here."""
    hooks = (lm_head._forward_hooks, lm_head._forward_pre_hooks, lm_head._backward_hooks, lm_head._backward_pre_hooks)
    return (
        type(lm_head) is nn.Linear
        and lm_head.bias is None
        and type(lm_head.weight.data) is torch.Tensor
        and not any(hooks)
        # Offloading replaces the method of one module.
        and "forward" not in vars(lm_head)
    )


def _recomputed_sum(
    lm_head: nn.Module, tokens: torch.Tensor, targets: torch.Tensor, chunk_tokens: int, ignore_index: int
) -> torch.Tensor:
    """Return the sum of the cross entropies, with each chunk's logits computed again in the backward pass."""

    def chunk_sum(chunk: torch.Tensor, chunk_targets: torch.Tensor) -> torch.Tensor:
        # With a batch dimension, as parallel plans of the head expect it.
        logits = lm_head(chunk.unsqueeze(0)).squeeze(0)
        return F.cross_entropy(logits.float(), chunk_targets, ignore_index=ignore_index, reduction="sum")

    sums = [
        checkpoint(chunk_sum, *chunk, use_reentrant=False)
        for chunk in zip(tokens.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    return torch.stack(sums).sum()


class _SummedCrossEntropy(torch.autograd.Function):
    """The sum of the cross entropies of tokens [T, H] under a head's weight [V, H], in float32."""

    @staticmethod
    def forward(ctx, tokens, weight, targets, chunk_tokens, ignore_index, needs_gradients):
        device_type = tokens.device.type
        is_autocast = torch.is_autocast_enabled(device_type)
        compute_dtype = torch.get_autocast_dtype(device_type) if is_autocast else tokens.dtype
        token_gradient = torch.empty_like(tokens) if needs_gradients and tokens.requires_grad else None
        weight_gradient = torch.zeros_like(weight) if needs_gradients and weight.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=tokens.device)
        with torch.autocast(device_type, enabled=False):
            compute_weight = weight.to(compute_dtype)
            for begin in range(0, len(tokens), chunk_tokens):
                chunk = tokens[begin : begin + chunk_tokens].to(compute_dtype)  # [C, H]
                chunk_targets = targets[begin : begin + chunk_tokens]
                loss, logit_gradient = _cross_entropy(F.linear(chunk, compute_weight), chunk_targets, ignore_index)
                total += loss
                if token_gradient is not None:
                    token_gradient[begin : begin + chunk_tokens] = logit_gradient @ compute_weight
                if weight_gradient is not None and weight_gradient.dtype == compute_dtype:
                    weight_gradient.addmm_(logit_gradient.T, chunk)
                elif weight_gradient is not None:
                    weight_gradient += logit_gradient.T @ chunk
                # Or it would stay beside the logits of the next chunk.
                del logit_gradient
        ctx.gradients = (token_gradient, weight_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, total_gradient):
        if ctx.gradients is None:
            raise RuntimeError(
                "A loss with loss_chunk_tokens has one backward pass, which uses its gradients up; compute the loss "
                "again, or set loss_chunk_tokens=None."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: the weight's is as large as the weight.
        scaled = [None if gradient is None else gradient.mul_(total_gradient) for gradient in gradients]
        return *scaled, None, None, None, None


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the cross entropies of `logits` [C, V], which are overwritten, and its gradient [C, V]."""
    dtype = logits.dtype
    logits = logits.float()
    is_target = targets != ignore_index
    index = targets.masked_fill(~is_target, 0).unsqueeze(-1)  # [C, 1]
    logits -= logits.amax(dim=-1, keepdim=True)
    target_logits = logits.gather(-1, index)
    probabilities = logits.exp_()
    sums = probabilities.sum(dim=-1, keepdim=True)
    losses = (sums.log() - target_logits).squeeze(-1)
    probabilities /= sums
    probabilities.scatter_add_(-1, index, -torch.ones_like(target_logits))
    probabilities *= is_target.unsqueeze(-1)
    return torch.where(is_target, losses, 0.0).sum(), probabilities.to(dtype)


__all__ = ["chunked_causal_lm_loss"]
