"""The plan of a conversion: every tensor, shard and byte of the result, settled before anything is written."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from modeling_upcycled_moe import UpcycledQwenMoeConfig

from ..common.flops import forward_flops_per_token
from ..common.settings import SettingsError
from ..common.streaming.contents import num_computed_elements
from ..common.streaming.planned import PlannedTensor, Shard, into_shards, num_parameters
from ..common.streaming.stored import DTYPES
from ..common.text_files import find_files
from .experts import expert_width
from .preservation import Preservation, preservation
from .recipe import ConversionRecipe
from .routers import ROUTER_INITIALIZERS, RouterInitializer
from .source import ARCHITECTURES, DenseSource
from .sources import open_sources, with_commits
from .tensors import planned_tensors, router_module


# Buffers, the interpreter and its libraries; measured, see benchmarks/README.md.
BASE_MEMORY_BYTES = 450 * 1000**2
# A matrix that is computed is there once, and so is what it is computed from, and once more what lies between.
TENSORS_PER_COMPUTED_PART = 3

# What the recipe calls a field of the configuration, where it has another name for it.
RECIPE_NAMES = {"router_type": "router", "shared_expert_gating": "shared_expert"}


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write.

    Args:
        sources: the dense models, the one that gives configuration and tokenizer first.
        router: what the routers start from.
        config: configuration of the MoE model.
        calibration_files: the local files with calibration text.
        shards: the weight files.
    """

    sources: tuple[DenseSource, ...]
    recipe: ConversionRecipe
    router: RouterInitializer
    config: UpcycledQwenMoeConfig
    calibration_files: tuple[Path, ...]
    shards: tuple[Shard, ...]

    @property
    def source(self) -> DenseSource:
        """The dense model, the first if there are several."""
        return self.sources[0]

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
        return num_parameters(self.shards, self.config.tie_word_embeddings)

    @property
    def tied_head_parameters(self) -> int:
        """Parameters of an output head that is the embedding, and which some count once more."""
        if not self.config.tie_word_embeddings or not self.config.architectures[0].endswith("ForCausalLM"):
            return 0
        return self.config.vocab_size * self.config.hidden_size

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all but the experts that it is not sent to.

        At most: if a token takes experts without computation, or fewer experts than it may (`top_p`), it meets less.
        With `expert_choice` it is the average.
        """
        config = self.config
        idle_share = 1 - min(config.num_experts_per_tok, config.num_experts) / config.num_experts
        idle = self._num_elements(".mlp.experts.") * idle_share + self._num_elements(".mlp.constant_experts.")
        return self.total_parameters - round(idle)

    def _num_elements(self, name_part: str) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors if name_part in tensor.name)

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward pass, without the scores of attention.

        The scores grow with the context; see `forward_flops_per_token`.
        """
        return forward_flops_per_token(self.config)

    @property
    def preserves_function(self) -> str:
        """How well the MoE model computes what the dense one does: `exact`, `approximate` or `none`."""
        return self._preservation.level

    @property
    def preservation_reason(self) -> str:
        """Why it does so."""
        return self._preservation.reason

    @property
    def _preservation(self) -> Preservation:
        dtypes = {tensor.dtype for tensor in self.tensors if ".mlp.experts." in tensor.name}
        return preservation(self.recipe, self.config, dtypes)

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the largest resident memory.

        Copying needs none; computing holds one matrix of one expert, calibration activations and one layer.
        """
        largest_part_bytes = max(
            num_computed_elements(tensor.content) * DTYPES[tensor.dtype].itemsize
            for tensor in self.tensors
            if tensor.content is not None
        )
        return BASE_MEMORY_BYTES + max(TENSORS_PER_COMPUTED_PART * largest_part_bytes, self._calibration_bytes)

    @property
    def _calibration_bytes(self) -> int:
        if not self.recipe.calibration_data:
            return 0
        config, recipe = self.config, self.recipe
        batch_tokens = recipe.calibration_batch_size * recipe.calibration_block_size
        embedding = self.source.tensors["model.embed_tokens.weight"]
        itemsize = DTYPES[embedding.dtype].itemsize
        layer_bytes = sum(tensor.num_bytes for tensor in self.source.layer(0).values())
        # Of all tokens: what goes into the next layer, what came into the FFN, and the scores of the experts.
        kept_bytes = recipe.num_calibrated_tokens * (
            2 * config.hidden_size * itemsize + 2 * 4 * config.num_routed_experts
        )
        batch_bytes = batch_tokens * itemsize * (3 * config.intermediate_size + 6 * config.hidden_size)
        read_bytes = min(embedding.num_bytes, recipe.num_calibrated_tokens * config.hidden_size * itemsize)
        return kept_bytes + batch_bytes + read_bytes + 2 * layer_bytes

    def to_dict(self, out: Path | None = None) -> dict[str, Any]:
        """Return the plan for `--json`; with `out`, also the free disk space where it will be written."""
        result = {
            "source": {"name": self.source.name, "revision": self.source.revision},
            "expert_sources": [{"name": other.name, "revision": other.revision} for other in self.sources[1:]],
            "recipe": self.recipe.to_dict(),
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
            "tied_head_parameters": self.tied_head_parameters,
            "flops_per_token": self.flops_per_token,
            "num_bytes": self.num_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "preserves_function": self.preserves_function,
            "preservation_reason": self.preservation_reason,
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
    """Return the plan for converting `source`, and the further dense models that `recipe` names, by `recipe`.

    Raises:
        SettingsError: if the recipe does not fit the source, or the dense models do not fit each other, or it asks for
            text that it does not name or that is absent.
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
    sources = open_sources(source, recipe)
    return ConversionPlan(
        sources,
        with_commits(recipe, sources),
        router,
        config,
        _calibration_files(recipe),
        into_shards(planned_tensors(sources, recipe, config), recipe.max_shard_bytes),
    )


def _calibration_files(recipe: ConversionRecipe) -> tuple[Path, ...]:
    if not recipe.calibration_data:
        return ()
    return tuple(file for name in recipe.calibration_data for file in find_files(name, recipe.calibration_split))


def build_config(
    source: DenseSource, recipe: ConversionRecipe, router_fields: Mapping[str, Any]
) -> UpcycledQwenMoeConfig:
    """Return the configuration of the MoE model: the dense one's fields, and what recipe and router add."""
    names = UpcycledQwenMoeConfig.__dataclass_fields__.keys() - {"model_type", "transformers_version", "architectures"}
    dense = {name: value for name, value in source.config.to_dict().items() if name in names}
    settings = {name: value for name, value in recipe.to_dict().items() if name in names}
    if recipe.moe_layers is not None:
        settings["mlp_only_layers"] = _dense_layers(recipe.moe_layers, source.config.num_hidden_layers)
    if recipe.shared_expert != "none":
        settings["shared_expert_intermediate_size"] = source.config.intermediate_size
        settings["shared_expert_gating"] = recipe.shared_expert
    try:
        return UpcycledQwenMoeConfig(
            **dense
            | settings
            | {
                "base_model_type": source.config.model_type,
                "architectures": [ARCHITECTURES[source.config.architectures[0]]],
                "head_dim": source.head_dim,
                "moe_intermediate_size": expert_width(recipe, source.config.intermediate_size),
            }
            | router_fields
        )
    except StrictDataclassError as error:
        message = str(error.__cause__ or error)
        for name, setting in RECIPE_NAMES.items():
            message = message.replace(f"{name}=", f"{setting}=")
        raise SettingsError(message) from error


def _dense_layers(moe_layers: list[int], num_layers: int) -> list[int]:
    """Return the layers that `moe_layers` leaves dense."""
    if not moe_layers:
        raise SettingsError("moe_layers=[] leaves no layer with experts; name at least one, or leave it out for all.")
    if outside := [layer_idx for layer_idx in moe_layers if not 0 <= layer_idx < num_layers]:
        raise SettingsError(f"moe_layers names {outside}, but layers run from 0 to {num_layers - 1}.")
    if twice := sorted({layer_idx for layer_idx in moe_layers if moe_layers.count(layer_idx) > 1}):
        raise SettingsError(f"moe_layers names {twice} more than once; name each layer once.")
    return [layer_idx for layer_idx in range(num_layers) if layer_idx not in moe_layers]


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


def free_disk_bytes(out: Path) -> int:
    """Return the free space where `out` will be written; `out` need not exist."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
