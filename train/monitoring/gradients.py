"""Norms of gradients."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ..groups import parameter_group


def gradient_norms(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Return the 2-norm of the gradients of each group of `parameter_group`, where there are any.

    Of sharded parameters it is the norm of the whole: all processes must call this. Values stay on the device.
    """
    gradients: dict[str, dict[object, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in named_parameters:
        if parameter.grad is not None:
            # Tensors on different meshes of processes do not go into one sum.
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            gradients[parameter_group(name)][mesh].append(parameter.grad)
    return {group: _norm_of_all(by_mesh.values()) for group, by_mesh in gradients.items()}


def _norm_of_all(parts: Iterable[list[torch.Tensor]]) -> torch.Tensor:
    norms = [get_total_norm(part) for part in parts]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in whole]))
