"""A model whose weights are sums of others, and which an optimizer trains by what each of them counts.

Dimensions: K sources of a group, F of them with fixed shares.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..settings import SettingsError
from ..streaming.contents import row_blocks
from .coefficients import SoftmaxCoefficients
from .sources import Blend


# Of the coefficients in the state of the optimizer, which a Trainer saves and loads.
STATE_KEY = "learned_merge"
_SHARDED = "learn a merge with a whole model on each device (one process, or DDP), not with FSDP or DeepSpeed ZeRO-3."


@dataclass(frozen=True)
class BlendGroup:
    """Weights that have their coefficients in common.

    Args:
        name: of the group, for results, e.g. a layer.
        coefficients: of its K sources.
        blends: the parts of parameters that it is about; each has K sources.
    """

    name: str
    coefficients: SoftmaxCoefficients
    blends: Sequence[Blend]


class LearnedMerge(nn.Module):
    """Makes the weights of a plain model `W(c) = Σ_k c_k S_k`, and trains c.

    The model runs as it is: what differs is the optimizer. Before a step it takes the gradient of c from the gradients
    of the weights, `∂L/∂c_k = ⟨∂L/∂W, S_k⟩`, whatever made those: gradient accumulation, checkpointing, several
    processes with whole models. After the step the weights are made anew. Sources are read from their files, so that
    memory holds one model and its gradients.

        merge = LearnedMerge(model, groups)
        optimizer = merge.attached(torch.optim.Adam(merge.parameters(), lr=0.1))
        Trainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()

    Weights that no group has stay as they are and get no gradient. Buffers that a group has are written too. A
    Trainer's `max_grad_norm` clips the gradients of the weights, of which those of c are made: set it to 0. Its fp16
    scales those gradients and looks for the optimizer's before they are there: train in float32 or bfloat16. With
    reentrant checkpointing and frozen embeddings, call `model.enable_input_require_grads()`, as for adapters.

    Args:
        model: whose weights are written to; not sharded. The larger its type, the smaller the change of c that it
            follows: in bfloat16 a weight stays the same until its sum moves by 2⁻⁹ of it.
        groups: with names of their own; each part of a weight is in one blend at most.

    Raises:
        SettingsError: if the model shards a weight.
        ValueError: if it lacks one, blends overlap, or groups do not fit their coefficients.
    """

    def __init__(self, model: nn.Module, groups: Sequence[BlendGroup]):
        super().__init__()
        self.groups = tuple(groups)
        self.coefficients = nn.ModuleList(group.coefficients for group in groups)
        self._blended = _blended_tensors(model, groups)
        _check_groups(groups, self._blended)
        model.requires_grad_(False)
        for tensor in self._parameters_blended():
            tensor.requires_grad_(True)
        self.register_load_state_dict_post_hook(lambda *_: self.write())
        self.write()

    def attached(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return `optimizer`, of the parameters of this module, whose steps now begin with `collect` and end with
        `write`.

        Its state holds the coefficients too, so that a Trainer that resumes goes on with them.
        """
        optimizer.register_step_pre_hook(lambda *_: self.collect())
        optimizer.register_step_post_hook(lambda *_: self.write())
        optimizer.register_state_dict_post_hook(self._add_state)
        optimizer.register_load_state_dict_pre_hook(self._take_state)
        return optimizer

    @torch.no_grad()
    def write(self) -> None:
        """Make the weights of the model by the coefficients as they are; sums are in float32."""
        for group, blend, tensor in self._each_blend():
            coefficients = group.coefficients().tolist()
            part = blend.of(tensor)
            for begin, end in row_blocks(tuple(part.shape)):
                total = torch.zeros(end - begin, part.shape[1], dtype=torch.float32, device=part.device)
                for coefficient, source in zip(coefficients, blend.sources, strict=True):
                    if coefficient > 0:
                        total.add_(source.rows(begin, end).to(total), alpha=coefficient)
                part[begin:end] = total.to(part.dtype)

    def collect(self) -> None:
        """Set the gradients of the coefficients from those of the weights, which are dropped.

        They are set, not added to: a gradient of the weights is the sum over all micro-batches of a step.

        Raises:
            SettingsError: if no weight has a gradient: there was no backward pass since the last step, or the model
                was sharded after the merge took hold of it.
        """
        if all(parameter.grad is None for parameter in self._parameters_blended()):
            raise SettingsError(
                f"No weight of the merge has a gradient; call backward before each step, and {_SHARDED}"
            )
        gradients = {
            group.name: torch.zeros(group.coefficients.num_sources, dtype=torch.float64) for group in self.groups
        }
        for group, blend, tensor in self._each_blend():
            if tensor.grad is not None:
                gradients[group.name] += _inner_products(blend, tensor.grad, group.coefficients.num_fixed)
        for parameter in self._parameters_blended():
            parameter.grad = None
        self.zero_grad(set_to_none=True)
        for group in self.groups:
            group.coefficients().backward(gradients[group.name])

    def gradient_norm(self) -> float:
        """Return the norm of the gradients that the last `collect` set, over all groups."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        return torch.cat([gradient.flatten() for gradient in gradients]).norm().item() if gradients else 0.0

    def values(self) -> dict[str, list[float]]:
        """Return the coefficients [K] of each group by its name."""
        return {group.name: group.coefficients().tolist() for group in self.groups}

    def _each_blend(self) -> Iterator[tuple[BlendGroup, Blend, Tensor]]:
        for group in self.groups:
            for blend in group.blends:
                yield group, blend, self._blended[blend.parameter]

    def _parameters_blended(self) -> list[nn.Parameter]:
        return [tensor for tensor in self._blended.values() if isinstance(tensor, nn.Parameter)]

    def _add_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, STATE_KEY: {name: value.clone() for name, value in self.state_dict().items()}}

    def _take_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if STATE_KEY not in state:
            raise SettingsError("The state of the optimizer holds no coefficients of a merge; start the run anew.")
        self.load_state_dict(state[STATE_KEY])


def _blended_tensors(model: nn.Module, groups: Sequence[BlendGroup]) -> dict[str, Tensor]:
    # A parameter that is tied has several names.
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    blended = {}
    for group in groups:
        for blend in group.blends:
            if blend.parameter not in tensors:
                raise ValueError(f"{blend.parameter!r} is no weight of the model that is merged into.")
            if isinstance(tensors[blend.parameter], DTensor):
                raise SettingsError(f"{blend.parameter!r} is sharded; {_SHARDED}")
            blended[blend.parameter] = tensors[blend.parameter]
    return blended


def _check_groups(groups: Sequence[BlendGroup], blended: dict[str, Tensor]) -> None:
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise ValueError(f"groups {names} need names of their own.")
    by_tensor: dict[int, list[Blend]] = {}
    for group in groups:
        for blend in group.blends:
            if len(blend.sources) != group.coefficients.num_sources:
                raise ValueError(
                    f"{group.name}: {blend.parameter!r} has {len(blend.sources)} sources, and the group coefficients "
                    f"of {group.coefficients.num_sources}."
                )
            by_tensor.setdefault(id(blended[blend.parameter]), []).append(blend)
    for blends in by_tensor.values():
        tensor = blended[blends[0].parameter]
        for first, second in combinations(blends, 2):
            if first.overlaps(second, tensor):
                raise ValueError(f"{first.parameter!r} and {second.parameter!r} blend the same weights.")


@torch.no_grad()
def _inner_products(blend: Blend, gradient: Tensor, num_fixed: int) -> Tensor:
    """Return the products [K] of a gradient with the sources, less that with the first one whose share is not fixed.

    A softmax passes on differences only, and these are exact to more digits where sources are almost alike. What is
    fixed needs no gradient: its products are zero.
    """
    part = blend.of(gradient.contiguous())
    products = torch.zeros(len(blend.sources), dtype=torch.float64)
    first, *others = blend.sources[num_fixed:]
    for begin, end in row_blocks(tuple(part.shape)):
        rows = part[begin:end].float()
        base = first.rows(begin, end).to(rows)
        differences = [torch.sum(rows * (source.rows(begin, end).to(rows) - base)) for source in others]
        if differences:
            # One transfer from an accelerator for all.
            products[num_fixed + 1 :] += torch.stack(differences).cpu().double()
    return products
