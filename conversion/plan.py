"""The plan of a conversion: every tensor, shard and byte of the result, settled before anything is written."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_upcycled_moe import ROUTERS, Router, UpcycledQwenMoeConfig

from ..common.settings import SettingsError
from .experts import EXPERTS, FileBytes
from .recipe import ConversionRecipe
from .routers import ROUTER_INITIALIZERS, RouterInitializer
from .source import ARCHITECTURES, DTYPES, DenseSource


# Buffers, the interpreter and its libraries; measured, see benchmarks/README.md.
BASE_MEMORY_BYTES = 450 * 1000**2


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the result; `content` is None for what is computed during the conversion."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: FileBytes | None

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One weight file of the result."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write.

    Args:
        router: what the routers start from.
        config: configuration of the MoE model.
        calibration_files: the local files with calibration text.
        shards: the weight files.
    """

    source: DenseSource
    recipe: ConversionRecipe
    router: RouterInitializer
    config: UpcycledQwenMoeConfig
    calibration_files: tuple[Path, ...]
    shards: tuple[Shard, ...]

    @property
    def tensors(self) -> list[PlannedTensor]:
        """All tensors, in file order."""
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def total_parameters(self) -> int:
        """Parameters of the MoE model; tied embeddings count once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors if not self._is_tied_copy(tensor))

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all but the experts that it is not sent to."""
        share = self.config.num_experts_per_tok / self.config.num_experts
        routed = sum(math.prod(tensor.shape) for tensor in self.tensors if ".mlp.experts." in tensor.name)
        return self.total_parameters - round(routed * (1 - share))

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward pass, two for each weight of a matrix that it meets.

        Without the scores of attention, which grow with the context; the output head counts, the embedding does not.
        """
        config, router = self.config, router_module(self.config)
        embedding = config.vocab_size * config.hidden_size
        routers = len(config.moe_layers) * sum(parameter.numel() for parameter in router.parameters())
        matrices = self.active_parameters - embedding - routers
        if config.tie_word_embeddings and config.architectures[0].endswith("ForCausalLM"):
            matrices += embedding
        return 2 * matrices + len(config.moe_layers) * router.flops_per_token

    @property
    def preserves_function(self) -> str:
        """How well the MoE model computes what the dense one does: `exact`, `approximate` or `none`."""
        return EXPERTS[self.recipe.experts].preserves_function if self.config.norm_topk_prob else "none"

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the largest resident memory. Copying needs none; calibration holds activations and one layer."""
        if not self.recipe.calibration_data:
            return BASE_MEMORY_BYTES
        config, recipe = self.config, self.recipe
        batch_tokens = recipe.calibration_batch_size * recipe.calibration_block_size
        embedding = self.source.tensors["model.embed_tokens.weight"]
        itemsize = DTYPES[embedding.dtype].itemsize
        layer_bytes = sum(tensor.num_bytes for tensor in self.source.layer(0).values())
        # Of all tokens: what goes into the next layer, what came into the FFN, and the scores of the experts.
        kept_bytes = recipe.num_calibrated_tokens * (2 * config.hidden_size * itemsize + 2 * 4 * config.num_experts)
        batch_bytes = batch_tokens * itemsize * (3 * config.intermediate_size + 6 * config.hidden_size)
        read_bytes = min(embedding.num_bytes, recipe.num_calibrated_tokens * config.hidden_size * itemsize)
        return BASE_MEMORY_BYTES + kept_bytes + batch_bytes + read_bytes + 2 * layer_bytes

    def _is_tied_copy(self, tensor: PlannedTensor) -> bool:
        return tensor.name == "lm_head.weight" and self.config.tie_word_embeddings

    def to_dict(self, out: Path | None = None) -> dict[str, Any]:
        """Return the plan for `--json`; with `out`, also the free disk space where it will be written."""
        result = {
            "source": {"name": self.source.name, "revision": self.source.revision},
            "recipe": self.recipe.to_dict(),
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
            "flops_per_token": self.flops_per_token,
            "num_bytes": self.num_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "preserves_function": self.preserves_function,
            "routers": [asdict(router) for router in router_plans(self)],
            "shards": [{"file": shard.file_name, "num_bytes": shard.num_bytes} for shard in self.shards],
            "tensors": [
                {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)} for tensor in self.tensors
            ],
        }
        if out is not None:
            result["free_disk_bytes"] = free_disk_bytes(out)
        return result


@dataclass(frozen=True)
class RouterPlan:
    """How the router of one layer starts."""

    layer: int
    router: str
    initialization: str
    parameters: int
    folds: bool


def build_plan(source: DenseSource, recipe: ConversionRecipe) -> ConversionPlan:
    """Return the plan for converting `source` by `recipe`.

    Raises:
        SettingsError: if the recipe does not fit the source, or asks for text that it does not name or that is absent.
    """
    if recipe.calibration_data and not source.has_tokenizer:
        raise SettingsError(f"{source.name}: has no tokenizer to read calibration_data with; put its files beside it.")
    if recipe.calibration_data and recipe.calibration_block_size > source.config.max_position_embeddings:
        raise SettingsError(
            f"calibration_block_size={recipe.calibration_block_size} exceeds the model's "
            f"max_position_embeddings={source.config.max_position_embeddings}; lower it."
        )
    router = ROUTER_INITIALIZERS[recipe.router](source, recipe)
    config = build_config(source, recipe, router.config_fields())
    return ConversionPlan(
        source,
        recipe,
        router,
        config,
        _calibration_files(recipe),
        _shards(_planned_tensors(source, recipe, config), recipe),
    )


def _calibration_files(recipe: ConversionRecipe) -> tuple[Path, ...]:
    if not recipe.calibration_data:
        return ()
    # Imported here: a plan without text need not wait for the readers of text.
    from ..common.text import find_files

    return tuple(file for name in recipe.calibration_data for file in find_files(name, recipe.calibration_split))


def build_config(
    source: DenseSource, recipe: ConversionRecipe, router_fields: Mapping[str, Any]
) -> UpcycledQwenMoeConfig:
    """Return the configuration of the MoE model: the dense one's fields, and what recipe and router add."""
    names = UpcycledQwenMoeConfig.__dataclass_fields__.keys() - {"transformers_version", "architectures"}
    dense = {name: value for name, value in source.config.to_dict().items() if name in names}
    settings = {name: value for name, value in recipe.to_dict().items() if name in names}
    try:
        return UpcycledQwenMoeConfig(
            **dense
            | settings
            | {
                "base_model_type": source.config.model_type,
                "architectures": [ARCHITECTURES[source.config.architectures[0]]],
                "head_dim": source.head_dim,
                "moe_intermediate_size": source.config.intermediate_size,
                "router_type": recipe.router,
            }
            | router_fields
        )
    except StrictDataclassError as error:
        raise SettingsError(str(error.__cause__ or error)) from error


def router_plans(plan: ConversionPlan) -> list[RouterPlan]:
    """Return how the router of each MoE layer starts."""
    router = router_module(plan.config)
    return [
        RouterPlan(
            layer=layer_idx,
            router=plan.recipe.router,
            initialization=plan.router.describe(),
            parameters=sum(parameter.numel() for parameter in router.parameters()),
            folds=router.fold_obstacle is None,
        )
        for layer_idx in plan.config.moe_layers
    ]


def router_module(config: UpcycledQwenMoeConfig) -> Router:
    """Return a router of the MoE model without storage, which knows its shapes, its cost and whether it folds."""
    with torch.device("meta"):
        return ROUTERS[config.router_type](config)


def free_disk_bytes(out: Path) -> int:
    """Return the free space where `out` will be written; `out` need not exist."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _planned_tensors(
    source: DenseSource, recipe: ConversionRecipe, config: UpcycledQwenMoeConfig
) -> list[PlannedTensor]:
    planned = []
    for tensor in sorted(source.tensors.values(), key=_file_order):
        layer_idx = _layer_of(tensor.name)
        if tensor.name.endswith("rotary_emb.inv_freq"):
            continue
        if layer_idx is not None and ".mlp." in tensor.name and config.is_moe_layer(layer_idx):
            continue
        planned.append(PlannedTensor(tensor.name, tensor.dtype, tensor.shape, FileBytes.whole(tensor)))
        if layer_idx is not None and tensor.name.endswith("post_attention_layernorm.weight"):
            planned += _moe_tensors(source, recipe, config, layer_idx)
    return planned


def _moe_tensors(
    source: DenseSource, recipe: ConversionRecipe, config: UpcycledQwenMoeConfig, layer_idx: int
) -> list[PlannedTensor]:
    if not config.is_moe_layer(layer_idx):
        return []
    layer = source.layer(layer_idx)
    prefix = f"model.layers.{layer_idx}.mlp."
    experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes = {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}
    dtype = layer["mlp.down_proj.weight"].dtype
    contents = EXPERTS[recipe.experts].contents(layer, experts)
    return [
        PlannedTensor(f"{prefix}experts.{name}", dtype, shape, contents[name]) for name, shape in shapes.items()
    ] + [
        PlannedTensor(f"{prefix}gate.{name}", dtype, tuple(parameter.shape), None)
        for name, parameter in router_module(config).named_parameters()
    ]


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def _file_order(tensor) -> tuple:
    """Embedding, layers in their order, final norm, heads; inside a layer the MLP's norm last, before the experts."""
    layer_idx = _layer_of(tensor.name)
    if layer_idx is not None:
        return (1, layer_idx, tensor.name.endswith("post_attention_layernorm.weight"), tensor.name)
    return (0 if "embed_tokens" in tensor.name else 2, 0, False, tensor.name)


def _shards(tensors: list[PlannedTensor], recipe: ConversionRecipe) -> tuple[Shard, ...]:
    groups: list[list[PlannedTensor]] = [[]]
    size_bytes = 0
    for tensor in tensors:
        if groups[-1] and size_bytes + tensor.num_bytes > recipe.max_shard_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(tensor)
        size_bytes += tensor.num_bytes
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(tensors)),)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    )
