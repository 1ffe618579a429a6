"""A model whose weights are sums of others, and which an optimizer trains by what each of them counts.

Dimensions: K sources of a group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..settings import SettingsError
from ..streaming.contents import row_blocks
from .coefficients import SoftmaxCoefficients
from .sources import Blend


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
        optimizer = merge.attached(torch.optim.Adam(merge.parameters(), lr=0.05))
        Trainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()

    Weights that no group has stay as they are and get no gradient. `max_grad_norm` of a Trainer clips the gradients of
    the weights, of which those of c are made.

    Args:
        model: whose parameters are written to; not sharded.
        groups: each part of a parameter is in one blend at most.

    Raises:
        SettingsError: if the model lacks a parameter, or shards it.
    """

    def __init__(self, model: nn.Module, groups: Sequence[BlendGroup]):
        super().__init__()
        self.groups = tuple(groups)
        self.coefficients = nn.ModuleList(group.coefficients for group in groups)
        self._blended = _blended_parameters(model, groups)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self._blended.values():
            parameter.requires_grad_(True)
        self.write()

    def attached(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return `optimizer`, of the parameters of this module, whose steps now begin with `collect` and end with
        `write`."""
        optimizer.register_step_pre_hook(lambda *_: self.collect())
        optimizer.register_step_post_hook(lambda *_: self.write())
        return optimizer

    @torch.no_grad()
    def write(self) -> None:
        """Make the weights of the model by the coefficients as they are."""
        for group, blend, parameter in self._each_blend():
            coefficients = group.coefficients().tolist()
            part = blend.of(parameter)
            for begin, end in row_blocks(tuple(part.shape)):
                total = torch.zeros(end - begin, part.shape[1], dtype=torch.float32, device=part.device)
                for coefficient, source in zip(coefficients, blend.sources, strict=True):
                    total.add_(source.rows(begin, end).to(total), alpha=coefficient)
                part[begin:end] = total.to(part.dtype)

    def collect(self) -> None:
        """Set the gradients of the coefficients from those of the weights, which are dropped.

        They are set, not added to: a gradient of the weights is the sum over all micro-batches of a step.
        """
        gradients = {id(group): torch.zeros(len(group.coefficients()), dtype=torch.float64) for group in self.groups}
        for group, blend, parameter in self._each_blend():
            if parameter.grad is not None:
                gradients[id(group)] += _inner_products(blend, parameter.grad)
        for parameter in self._blended.values():
            parameter.grad = None
        self.zero_grad(set_to_none=True)
        for group in self.groups:
            coefficients = group.coefficients()
            coefficients.backward(gradients[id(group)].to(coefficients))

    def values(self) -> dict[str, list[float]]:
        """Return the coefficients [K] of each group by its name."""
        return {group.name: group.coefficients().tolist() for group in self.groups}

    def _each_blend(self) -> Iterator[tuple[BlendGroup, Blend, nn.Parameter]]:
        for group in self.groups:
            for blend in group.blends:
                yield group, blend, self._blended[blend.parameter]


def _blended_parameters(model: nn.Module, groups: Sequence[BlendGroup]) -> dict[str, nn.Parameter]:
    # A parameter that is tied has several names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    blended = {}
    for group in groups:
        for blend in group.blends:
            if blend.parameter not in parameters:
                raise SettingsError(f"{blend.parameter!r} is no parameter of the model that is merged into.")
            blended[blend.parameter] = parameters[blend.parameter]
            if isinstance(parameters[blend.parameter], DTensor):
                raise SettingsError(
                    f"{blend.parameter!r} is sharded; learn a merge with a whole model on each device (one process, or "
                    "DDP)."
                )
    return blended


@torch.no_grad()
def _inner_products(blend: Blend, gradient: Tensor) -> Tensor:
    """Return the products [K] of a gradient with the sources."""
    part = blend.of(gradient)
    products = torch.zeros(len(blend.sources), dtype=torch.float64)
    for begin, end in row_blocks(tuple(part.shape)):
        rows = part[begin:end].float().flatten()
        for index, source in enumerate(blend.sources):
            products[index] += torch.dot(rows, source.rows(begin, end).to(rows).flatten()).item()
    return products
