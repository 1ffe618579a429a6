"""Which tensors the result has, and what each of them is made of."""

import torch

from modeling_upcycled_moe import ROUTERS, Router, UpcycledQwenMoeConfig

from ..common.output_factors import output_factors
from ..common.streaming.contents import Computed, scaled
from ..common.streaming.planned import PlannedTensor, file_order, layer_of
from .backbone import BACKBONES, backbone_method
from .experts import DenseFfn, fused_experts
from .randomness import drawn_tensor
from .recipe import ConversionRecipe
from .source import DenseSource, expected_shapes


def router_module(config: UpcycledQwenMoeConfig) -> Router:
    """Return a router of the MoE model without storage, which knows its shapes, its cost and whether it folds."""
    with torch.device("meta"):
        return ROUTERS[config.router_type](config)


def planned_tensors(
    sources: tuple[DenseSource, ...], recipe: ConversionRecipe, config: UpcycledQwenMoeConfig
) -> list[PlannedTensor]:
    """Return all tensors of the result in file order, small ones of a layer before its experts.

    Args:
        sources: dense models that fit each other.
        config: configuration of the MoE model.
    """
    source, planned = sources[0], []
    # A stored copy of tied embeddings has its place only beside what it is a copy of.
    names = source.tensors if backbone_method(recipe) == "copy" else expected_shapes(source.config)
    for tensor in sorted((source.tensors[name] for name in names), key=file_order):
        layer_idx = layer_of(tensor.name)
        if tensor.name.endswith("rotary_emb.inv_freq"):
            continue
        if layer_idx is not None and ".mlp." in tensor.name and config.is_moe_layer(layer_idx):
            continue
        planned.append(_backbone_tensor(sources, recipe, tensor.name, tensor.name))
        if layer_idx is not None and tensor.name.endswith("post_attention_layernorm.weight"):
            planned += _moe_tensors(sources, recipe, config, layer_idx)
    return planned


def _backbone_tensor(
    sources: tuple[DenseSource, ...], recipe: ConversionRecipe, name: str, dense_name: str, factor: float = 1.0
) -> PlannedTensor:
    """Return the tensor `name` that is made of `dense_name` of the dense models."""
    tensors = tuple(source.tensors[dense_name] for source in sources)
    content = BACKBONES[backbone_method(recipe)](name, tensors, sources[0].config.initializer_range, recipe.seed)
    return PlannedTensor(name, tensors[0].dtype, tensors[0].shape, scaled(content, factor))


def _moe_tensors(
    sources: tuple[DenseSource, ...], recipe: ConversionRecipe, config: UpcycledQwenMoeConfig, layer_idx: int
) -> list[PlannedTensor]:
    if not config.is_moe_layer(layer_idx):
        return []
    prefix = f"model.layers.{layer_idx}.mlp."
    ffns = [DenseFfn.of_layer(source.layer(layer_idx)) for source in sources]
    dtype = ffns[0].down.dtype
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes = {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}
    contents = fused_experts(ffns, recipe, f"{prefix}experts", config.initializer_range)
    return [
        *(PlannedTensor(f"{prefix}experts.{name}", dtype, shape, contents[name]) for name, shape in shapes.items()),
        *_constant_experts(recipe, config, prefix, dtype),
        *_shared_expert(sources, recipe, config, prefix, dtype),
        *_router_tensors(config, prefix, dtype),
    ]


def _constant_experts(
    recipe: ConversionRecipe, config: UpcycledQwenMoeConfig, prefix: str, dtype: str
) -> list[PlannedTensor]:
    count, hidden = config.num_constant_experts, config.hidden_size
    shapes = {"vectors": (count, hidden), "weight": (count, 2, hidden)} if count else {}
    return [
        PlannedTensor(
            name, dtype, shape, Computed(shape, drawn_tensor, (shape, config.initializer_range, recipe.seed, name))
        )
        for name, shape in ((f"{prefix}constant_experts.{name}", shape) for name, shape in shapes.items())
    ]


def _shared_expert(
    sources: tuple[DenseSource, ...], recipe: ConversionRecipe, config: UpcycledQwenMoeConfig, prefix: str, dtype: str
) -> list[PlannedTensor]:
    """Return the shared expert, which starts as the backbone's dense FFN, and its gate, which starts half open."""
    if config.shared_expert_intermediate_size == 0:
        return []
    _, factor = output_factors(recipe.experts, recipe.backbone, recipe.shared_expert)
    factors = {"gate_proj": 1.0, "up_proj": 1.0, "down_proj": factor}
    planned = [
        _backbone_tensor(
            sources, recipe, f"{prefix}shared_expert.{name}.weight", f"{prefix}{name}.weight", output_factor
        )
        for name, output_factor in factors.items()
    ]
    if config.shared_expert_gating == "sigmoid":
        shape = (1, config.hidden_size)
        zeros = Computed(shape, torch.zeros, (shape,))
        planned.append(PlannedTensor(f"{prefix}shared_expert_gate.weight", dtype, shape, zeros))
    return planned


def _router_tensors(config: UpcycledQwenMoeConfig, prefix: str, dtype: str) -> list[PlannedTensor]:
    router = router_module(config)
    saved = router.state_dict()
    # Biases that balance the loads are no parameters; they start at zero, and stay in float32.
    return [
        PlannedTensor(f"{prefix}gate.{name}", dtype, tuple(parameter.shape), None)
        for name, parameter in router.named_parameters()
    ] + [
        PlannedTensor(
            f"{prefix}gate.{name}",
            "F32",
            tuple(buffer.shape),
            Computed(tuple(buffer.shape), torch.zeros, (tuple(buffer.shape),)),
            is_parameter=False,
        )
        for name, buffer in router.named_buffers()
        if name in saved
    ]
