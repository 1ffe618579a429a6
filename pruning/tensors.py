"""The checkpoint with fewer experts: its configuration, and what each of its tensors is made of.

Dimensions: E experts to choose from, C of them with weights of their own, H hidden size, I width of an expert, J keys.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from modeling_upcycled_moe import UpcycledQwenMoeConfig

from ..common.moe_source import MoeSource
from ..common.settings import SettingsError
from ..common.streaming.contents import Computed, Content, FileBytes, joined
from ..common.streaming.planned import PlannedTensor, file_order, layer_of
from ..common.streaming.stored import StoredTensor
from .alignment import FusedExperts, MergedExpert


# Tensors of a router with equal numbers of rows for each expert, in the experts' order.
ROUTER_ROWS = ("weight", "keys", "down_weight", "selector.e_score_correction_bias")
BUFFERS = ("e_score_correction_bias",)


@dataclass(frozen=True)
class PrunedLayer:
    """What becomes of the experts of a layer.

    Args:
        kept: experts with weights that stay, in their order; their routers stay with them.
        merged: the content of those of them that take in others.
    """

    kept: Sequence[int]
    merged: Mapping[int, MergedExpert] = field(default_factory=dict)

    def routed(self, config: UpcycledQwenMoeConfig) -> list[int]:
        """Return what routers choose from: the experts kept, and all those without computation, which come last."""
        return [*self.kept, *range(config.num_experts, config.num_routed_experts)]


def pruned_config(
    config: UpcycledQwenMoeConfig, num_experts: int, num_experts_per_tok: int | None
) -> UpcycledQwenMoeConfig:
    """Return the configuration of the model with `num_experts` experts with weights in each layer.

    Args:
        num_experts: fewer than before, and as many in each part (see `num_parts`).
        num_experts_per_tok: of the new model; by default as before.

    Raises:
        SettingsError: if a token would get more experts than before, or than there are.
    """
    pruned = copy.deepcopy(config)
    pruned.num_experts = num_experts
    if num_experts_per_tok is not None:
        if num_experts_per_tok > config.num_experts_per_tok:
            raise SettingsError(
                f"num_experts_per_tok={num_experts_per_tok} exceeds the {config.num_experts_per_tok} of the "
                "checkpoint, which was not trained for more; lower it or leave it out."
            )
        pruned.num_experts_per_tok = num_experts_per_tok
    if pruned.num_experts_per_tok > pruned.num_routed_experts:
        raise SettingsError(
            f"num_experts_per_tok={pruned.num_experts_per_tok} exceeds the {pruned.num_routed_experts} experts that "
            "are left; keep more, or lower it (--num-experts-per-tok)."
        )
    if pruned.router_type == "grouped_average":
        # It has no weights, and averages equal parts of the token, one for each of its experts.
        pruned.use_linear_router()
    if pruned.router_type == "mixture":
        pruned.num_router_keys = config.num_router_keys // config.num_routed_experts * pruned.num_routed_experts
    if pruned.expert_nodes is not None:
        # The experts of a node are neighbours, and as many are left of each; which ones, every layer settles itself.
        nodes = dict.fromkeys(config.expert_nodes[: config.num_experts])
        left = [node for node in nodes for _ in range(num_experts // len(nodes))]
        pruned.expert_nodes = left + config.expert_nodes[config.num_experts :]
    try:
        pruned.validate()
    except StrictDataclassError as error:
        raise SettingsError(str(error.__cause__ or error)) from error
    return pruned


def pruned_tensors(
    source: MoeSource, config: UpcycledQwenMoeConfig, layers: Mapping[int, PrunedLayer]
) -> list[PlannedTensor]:
    """Return all tensors of the checkpoint with `config`, in file order.

    Args:
        layers: by the index of the MoE layer.
    """
    planned = []
    for tensor in source.tensors.values():
        layer_idx = layer_of(tensor.name)
        prefix = f"model.layers.{layer_idx}.mlp."
        if layer_idx not in layers or not tensor.name.startswith((f"{prefix}experts.", f"{prefix}gate.")):
            planned.append(PlannedTensor(tensor.name, tensor.dtype, tensor.shape, FileBytes.whole(tensor)))
        elif tensor.name.startswith(f"{prefix}gate."):
            planned.append(_router_tensor(source.config, tensor, layers[layer_idx], prefix))
        else:
            planned.append(_experts_tensor(source, tensor, layers[layer_idx], prefix))
    if source.config.router_type != config.router_type:
        planned += [_linear_router(source, layer_idx, layer) for layer_idx, layer in layers.items()]
    return sorted(planned, key=file_order)


def fused_experts(source: MoeSource, layer_idx: int) -> FusedExperts:
    """Return the experts of MoE layer `layer_idx`."""
    prefix = f"model.layers.{layer_idx}.mlp.experts."
    return FusedExperts(source.tensors[f"{prefix}gate_up_proj"], source.tensors[f"{prefix}down_proj"])


def _experts_tensor(source: MoeSource, tensor: StoredTensor, layer: PrunedLayer, prefix: str) -> PlannedTensor:
    is_down = tensor.name.endswith("down_proj")
    contents: list[Content] = []
    for expert in layer.kept:
        merged = layer.merged.get(expert)
        if merged is None:
            contents.append(_rows(tensor, [expert], tensor.shape[0]))
        else:
            contents += merged.down_parts() if is_down else merged.gate_up_parts()
    shape = (len(layer.kept), *tensor.shape[1:])
    return PlannedTensor(tensor.name, tensor.dtype, shape, joined(*contents))


def _router_tensor(
    config: UpcycledQwenMoeConfig, tensor: StoredTensor, layer: PrunedLayer, prefix: str
) -> PlannedTensor:
    name = tensor.name.removeprefix(f"{prefix}gate.")
    is_parameter = not name.endswith(BUFFERS)
    if name not in ROUTER_ROWS:
        return PlannedTensor(tensor.name, tensor.dtype, tensor.shape, FileBytes.whole(tensor), is_parameter)
    routed = layer.routed(config)
    rows_each = tensor.shape[0] // config.num_routed_experts
    shape = (len(routed) * rows_each, *tensor.shape[1:])
    content = _rows(tensor, routed, config.num_routed_experts)
    return PlannedTensor(tensor.name, tensor.dtype, shape, content, is_parameter)


def _rows(tensor: StoredTensor, experts: Sequence[int], num_experts: int) -> FileBytes:
    """Return the rows of `tensor` that belong to `experts`, of `num_experts` with as many each."""
    size = tensor.num_bytes // num_experts
    return FileBytes(tuple((tensor, expert * size, size) for expert in experts))


def _linear_router(source: MoeSource, layer_idx: int, layer: PrunedLayer) -> PlannedTensor:
    """Return the linear router that gives the experts kept the same logits, for one that has no weights."""
    config, routed = source.config, layer.routed(source.config)
    shape = (len(routed), config.hidden_size)
    dtype = "F32" if config.router_dtype == "float32" else fused_experts(source, layer_idx).down.dtype
    content = Computed(shape, _folded_rows, (source, layer_idx, tuple(routed)))
    return PlannedTensor(f"model.layers.{layer_idx}.mlp.gate.weight", dtype, shape, content)


def _folded_rows(source: MoeSource, layer_idx: int, routed: tuple[int, ...]) -> Tensor:
    return source.router(layer_idx).fold()[list(routed)]
