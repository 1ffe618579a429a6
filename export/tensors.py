"""The tensors of the stock checkpoint: bytes of the upcycled one under other names, and folded routers.

Dimensions: H hidden size, E experts, I their width.
"""

from itertools import groupby

import torch

from ..common.moe_source import MoeSource
from ..common.settings import SettingsError
from ..common.streaming.contents import Computed, FileBytes, row_blocks
from ..common.streaming.planned import PlannedTensor, file_order, layer_of
from ..common.streaming.stored import StoredTensor
from .routers import router_tensor
from .targets import Target


def native_tensors(source: MoeSource, target: Target) -> list[PlannedTensor]:
    """Return the tensors of `source` as those of `target`, in file order."""
    planned: list[PlannedTensor] = []
    in_order = sorted(source.tensors.values(), key=file_order)
    for layer_idx, tensors in groupby(in_order, lambda tensor: layer_of(tensor.name)):
        is_moe = layer_idx is not None and source.config.is_moe_layer(layer_idx)
        planned += [
            _renamed(tensor, tensor.name)
            for tensor in tensors
            if not (is_moe and ".mlp." in tensor.name) and not _is_dropped_bias(tensor.name, target)
        ]
        if is_moe:
            planned += _moe_tensors(source, target, layer_idx)
    return planned


def _is_dropped_bias(name: str, target: Target) -> bool:
    """Return whether `name` is an attention bias that `target` has no place for; then it is zero."""
    return name.endswith("_proj.bias") and name.split(".")[-2] not in target.attention_biases


def _moe_tensors(source: MoeSource, target: Target, layer_idx: int) -> list[PlannedTensor]:
    ours, native = f"model.layers.{layer_idx}.mlp.", f"model.layers.{layer_idx}.{target.block_name}."
    gate_up = source.tensors[f"{ours}experts.gate_up_proj"]  # [E, 2I, H]
    down = source.tensors[f"{ours}experts.down_proj"]  # [E, H, I]
    gate_name, up_name, down_name = target.expert_projections
    planned = [router_tensor(source, layer_idx, f"{native}gate.weight")]
    for expert in range(source.config.num_experts):
        prefix = f"{native}experts.{expert}."
        planned += [
            _slice(gate_up, f"{prefix}{gate_name}.weight", 2 * expert, 2),
            _slice(gate_up, f"{prefix}{up_name}.weight", 2 * expert + 1, 2),
            _slice(down, f"{prefix}{down_name}.weight", expert, 1),
        ]
    if target.has_shared_expert:
        planned += _shared_expert(source, ours, native)
    return planned


def _slice(tensor: StoredTensor, name: str, number: int, per_expert: int) -> PlannedTensor:
    """Return matrix `number` of fused experts, each of which has `per_expert` of equal size one after the other."""
    num_experts, num_rows, num_columns = tensor.shape
    num_bytes = tensor.num_bytes // (num_experts * per_expert)
    content = FileBytes(((tensor, number * num_bytes, num_bytes),))
    return PlannedTensor(name, tensor.dtype, (num_rows // per_expert, num_columns), content)


def _shared_expert(source: MoeSource, ours: str, native: str) -> list[PlannedTensor]:
    """Return shared expert and gate; of a model that has none, the gate alone, which the target has all the same."""
    config = source.config
    planned, dtype = [], source.tensors[f"{ours}experts.down_proj"].dtype
    is_plain = config.shared_expert_gating == "plain"
    if config.shared_expert_intermediate_size > 0:
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"shared_expert.{projection}.weight"
            tensor = source.tensors[ours + name]
            is_doubled = is_plain and projection == "down_proj"
            planned.append(_doubled(tensor, native + name) if is_doubled else _renamed(tensor, native + name))
    gate = source.tensors.get(f"{ours}shared_expert_gate.weight")
    name = f"{native}shared_expert_gate.weight"
    return [*planned, _zeros(name, dtype, (1, config.hidden_size)) if gate is None else _renamed(gate, name)]


def _renamed(tensor: StoredTensor, name: str) -> PlannedTensor:
    return PlannedTensor(name, tensor.dtype, tensor.shape, FileBytes.whole(tensor))


def _zeros(name: str, dtype: str, shape: tuple[int, ...]) -> PlannedTensor:
    return PlannedTensor(name, dtype, shape, Computed(shape, torch.zeros, (shape,)))


def _doubled(tensor: StoredTensor, name: str) -> PlannedTensor:
    """Return twice `tensor`, exactly: a gate of zeros is open by half."""
    blocks = tuple(
        Computed((end - begin, *tensor.shape[1:]), _doubled_rows, (tensor, begin, end))
        for begin, end in row_blocks(tensor.shape)
    )
    return PlannedTensor(name, tensor.dtype, tensor.shape, blocks)


def _doubled_rows(tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
    doubled = tensor.load()[begin:end] * 2
    if not doubled.isfinite().all():
        raise SettingsError(
            f"{tensor.name}: doubled, as a plain shared expert has to be, it is beyond what {tensor.dtype} holds; "
            "save the checkpoint in BF16 or F32 first."
        )
    return doubled
