"""What a training run will cost: memory on each GPU, tokens, operations and hours, before it starts."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..common.flops import Gpu, gpu_flops, num_experts, training_flops_per_token
from ..common.settings import SettingsError, check_keys, load_yaml
from .arguments import DataArguments, EngineArguments, ModelArguments, RecipeArguments
from .memory import Layout, MemoryEstimate, Weights, estimate_memory, weights_of
from .model import LOSS_CHUNK_TOKENS


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAN_OPTIMIZER = "adamw_bnb_8bit"
MAX_PROCESSES = 4096


@dataclass(frozen=True)
class TrainingPlan:
    """A run that is planned.

    Args:
        config, weights: of the model that is trained.
        max_steps: optimizer steps; None if they are not settled yet.
        flops_per_token: operations of forward and backward pass.
        gpu: what it runs on, if that is known.
        gpu_memory_bytes: memory of a GPU, if that is known.
        utilization: share of the GPU's peak that the run is assumed to reach.
    """

    config: Any
    weights: Weights
    layout: Layout
    max_steps: int | None
    flops_per_token: int
    gpu: Gpu | None
    gpu_memory_bytes: int | None
    utilization: float

    @cached_property
    def memory(self) -> MemoryEstimate:
        """What each GPU needs."""
        return self._estimate(self.layout)

    def _estimate(self, layout: Layout) -> MemoryEstimate:
        return estimate_memory(self.config, layout, self.weights)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        layout = self.layout
        num_batches = layout.num_processes // (layout.tensor_parallel_size * layout.context_parallel_size)
        num_blocks = layout.micro_batch_size * layout.gradient_accumulation_steps * num_batches
        return num_blocks * layout.sequence_length

    @property
    def total_tokens(self) -> int | None:
        """Tokens of all steps."""
        return None if self.max_steps is None else self.max_steps * self.tokens_per_step

    @property
    def total_flops(self) -> int | None:
        """Operations of all steps."""
        return None if self.max_steps is None else self.total_tokens * self.flops_per_token

    @property
    def hours(self) -> float | None:
        """Hours of all steps, without evaluation and saving; None on a GPU that is not known."""
        compute_dtype = self.layout.mixed_precision or self.layout.weight_dtype
        peak = gpu_flops(self.gpu, compute_dtype) if self.gpu is not None else None
        if peak is None or self.total_flops is None:
            return None
        return self.total_flops / (peak * self.utilization * self.layout.num_processes) / 3600

    @property
    def missing_bytes(self) -> int | None:
        """By how much a GPU is too small; negative if it fits, None if its memory is not known."""
        return None if self.gpu_memory_bytes is None else self.memory.total_bytes - self.gpu_memory_bytes

    def remedies(self) -> list[tuple[str, MemoryEstimate]]:
        """Return what would need less memory, first one change at a time and then all of them together.

        Together, more GPUs are added until it fits, where it does at all.
        """
        found, together = [], self.layout
        for name, change in _changes(self.config, self.layout):
            estimate = self._estimate(replace(self.layout, **change))
            if estimate.total_bytes < self.memory.total_bytes:
                found.append((name, estimate))
                together = replace(together, **change)
        if len(found) > 1:
            found.append(("all of these", self._estimate(together)))
        if found and self.gpu_memory_bytes and found[-1][1].total_bytes > self.gpu_memory_bytes:
            found += self._on_more_gpus(together)
        return found

    def _on_more_gpus(self, layout: Layout) -> Iterator[tuple[str, MemoryEstimate]]:
        num_processes = layout.num_processes * 2
        while num_processes <= MAX_PROCESSES:
            more = replace(layout, num_processes=num_processes, engine="fsdp2", shard_size=None)
            estimate = self._estimate(more)
            if estimate.total_bytes <= self.gpu_memory_bytes:
                yield f"all of these, sharded over {num_processes} GPUs (FSDP2)", estimate
                return
            num_processes *= 2

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        layout = {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in asdict(self.layout).items()
        }
        return {
            "layout": layout,
            "memory_per_gpu": self.memory.to_dict(),
            "gpu_memory_bytes": self.gpu_memory_bytes,
            "missing_bytes": self.missing_bytes,
            "remedies": {name: estimate.total_bytes for name, estimate in self.remedies()},
            "tokens_per_step": self.tokens_per_step,
            "max_steps": self.max_steps,
            "total_tokens": self.total_tokens,
            "flops_per_token": self.flops_per_token,
            "total_flops": self.total_flops,
            "utilization": self.utilization,
            "hours": self.hours,
        }


def plan_training(
    config: Any,
    settings: Mapping[str, Any],
    accelerate: Mapping[str, Any],
    *,
    gpu: Gpu | None = None,
    gpu_memory_bytes: int | None = None,
    utilization: float = 0.4,
) -> TrainingPlan:
    """Return the plan of training a model of `config`.

    Args:
        settings: of the run, as `arguments.parse_settings` gives them.
        accelerate: configuration of `accelerate launch`, as in `configs/accelerate/`.

    Raises:
        SettingsError: if they do not go together, or ask for an engine that is not estimated.
    """
    layout = layout_of(config, settings, accelerate)
    max_steps = settings.get("max_steps", RecipeArguments.max_steps)
    return TrainingPlan(
        config=config,
        weights=weights_of(config),
        layout=layout,
        max_steps=max_steps if max_steps > 0 else None,
        flops_per_token=training_flops_per_token(config, layout.sequence_length),
        gpu=gpu,
        gpu_memory_bytes=gpu_memory_bytes if gpu_memory_bytes or gpu is None else gpu.memory_gb * 10**9,
        utilization=utilization,
    )


def layout_of(config: Any, settings: Mapping[str, Any], accelerate: Mapping[str, Any]) -> Layout:
    """Return the layout that the settings of a run and the configuration of `accelerate launch` make together.

    Raises:
        SettingsError: as [`plan_training`].
    """
    parallelism = {
        name.removeprefix("parallelism_config_"): value
        for name, value in (accelerate.get("parallelism_config") or {}).items()
    }
    fsdp = {name.removeprefix("fsdp_"): value for name, value in (accelerate.get("fsdp_config") or {}).items()}
    upcycled = hasattr(config, "router_type")

    def setting(name: str, group: type) -> Any:
        return settings.get(name, getattr(group, name))

    layout = Layout(
        num_processes=accelerate.get("num_processes", 1),
        tensor_parallel_size=setting("tensor_parallel_size", EngineArguments),
        expert_parallel_size=setting("expert_parallel_size", EngineArguments),
        context_parallel_size=parallelism.get("cp_size", 1),
        reshard_after_forward=fsdp.get("reshard_after_forward", True) not in (False, "NO_SHARD", "SHARD_GRAD_OP"),
        micro_batch_size=setting("per_device_train_batch_size", RecipeArguments),
        sequence_length=setting("block_size", DataArguments),
        sync_each_batch=_syncs_each_batch(settings),
        weight_dtype=_weight_dtype(config, setting("dtype", ModelArguments)),
        mixed_precision=_mixed_precision(settings, accelerate),
        optim=settings.get("optim", Layout.optim),
        gradient_checkpointing=bool(settings.get("gradient_checkpointing") or fsdp.get("activation_checkpointing")),
        attn_implementation=settings.get("attn_implementation") or "sdpa",
        experts_implementation=settings.get("experts_implementation") or "grouped_mm",
        loss_chunk_tokens=_loss_chunk_tokens(setting("loss_chunk_tokens", ModelArguments), upcycled),
        separates_documents=setting("document_mask", DataArguments),
        float32_routers=upcycled and setting("router_dtype", ModelArguments) != "model",
    )
    # FSDP2 shards over the processes that share a sequence, too.
    shards = parallelism.get("dp_shard_size", 1) * layout.context_parallel_size
    layout = replace(layout, engine=_engine(layout, settings, accelerate), shard_size=shards if shards > 1 else None)
    parts = layout.tensor_parallel_size * layout.context_parallel_size
    if layout.num_processes % parts:
        raise SettingsError(
            f"num_processes={layout.num_processes} is not a multiple of tensor_parallel_size x "
            f"parallelism_config_cp_size = {parts}; start a multiple."
        )
    return replace(layout, gradient_accumulation_steps=_accumulation(layout, settings))


def _engine(layout: Layout, settings: Mapping[str, Any], accelerate: Mapping[str, Any]) -> str:
    kind = str(accelerate.get("distributed_type", "NO")).upper()
    if layout.tensor_parallel_size > 1 or layout.expert_parallel_size > 1:
        return "load"
    if kind == "DEEPSPEED":
        stage = (accelerate.get("deepspeed_config") or {}).get("zero_stage")
        if stage != 3:
            raise SettingsError(f"deepspeed_config: zero_stage={stage} is not estimated; only 3 is.")
        return "zero3"
    return "fsdp2" if kind == "FSDP" or settings.get("fsdp") else "ddp"


def _weight_dtype(config: Any, name: str) -> torch.dtype:
    dtype = getattr(config, "dtype", None) if name == "auto" else name
    return dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype, torch.float32)


def _mixed_precision(settings: Mapping[str, Any], accelerate: Mapping[str, Any]) -> torch.dtype | None:
    for name in ("bf16", "fp16"):
        if settings.get(name):
            return PRECISIONS[name]
    name = str(accelerate.get("mixed_precision", "no")).lower()
    if name not in PRECISIONS:
        raise SettingsError(f"mixed_precision={name} is not estimated; allowed: {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


def _loss_chunk_tokens(given: int | None, upcycled: bool) -> int | None:
    if given is None:
        return LOSS_CHUNK_TOKENS if upcycled else None
    return given or None


def _syncs_each_batch(settings: Mapping[str, Any]) -> bool:
    options = settings.get("accelerator_config")
    options = load_yaml(options) if isinstance(options, str) else options or {}
    return (options.get("gradient_accumulation_kwargs") or {}).get("sync_each_batch", True)


def _accumulation(layout: Layout, settings: Mapping[str, Any]) -> int:
    tokens_per_step = settings.get("tokens_per_step")
    if tokens_per_step is None:
        return settings.get("gradient_accumulation_steps", 1)
    num_batches = layout.num_processes // (layout.tensor_parallel_size * layout.context_parallel_size)
    micro_batch_tokens = layout.sequence_length * layout.micro_batch_size * num_batches
    if tokens_per_step < 1 or tokens_per_step % micro_batch_tokens:
        raise SettingsError(
            f"tokens_per_step={tokens_per_step} is not a multiple of {micro_batch_tokens} = block_size x "
            f"per_device_train_batch_size x batches at a time = {layout.sequence_length} x "
            f"{layout.micro_batch_size} x {num_batches}."
        )
    return tokens_per_step // micro_batch_tokens


def read_accelerate_config(path: str | Path) -> dict[str, Any]:
    """Return the configuration of `accelerate launch` in the file `path`.

    Raises:
        SettingsError: if it is not one.
    """
    from accelerate.commands.config.config_args import ClusterConfig

    config = load_yaml(path)
    check_keys(config, ClusterConfig.__dataclass_fields__, str(path))
    return config


def _changes(config: Any, layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield settings of a run that need less memory than those of `layout`, as text and as fields."""
    if not layout.gradient_checkpointing:
        yield "gradient_checkpointing=true", {"gradient_checkpointing": True}
    if layout.micro_batch_size > 1:
        steps = layout.gradient_accumulation_steps * layout.micro_batch_size
        yield (
            "per_device_train_batch_size=1",
            {"micro_batch_size": 1, "gradient_accumulation_steps": steps},
        )
    if layout.loss_chunk_tokens is None and hasattr(config, "router_type"):
        yield f"loss_chunk_tokens={LOSS_CHUNK_TOKENS}", {"loss_chunk_tokens": LOSS_CHUNK_TOKENS}
    if layout.experts_implementation == "batched_mm" and num_experts(config):
        yield "experts_implementation=grouped_mm", {"experts_implementation": "grouped_mm"}
    if layout.engine == "ddp" and layout.num_processes > 1:
        yield "FSDP2 (configs/accelerate/fsdp2.yaml)", {"engine": "fsdp2"}
    if layout.engine == "fsdp2" and layout.gradient_accumulation_steps > 1 and not layout.sync_each_batch:
        setting = "accelerator_config={gradient_accumulation_kwargs: {sync_each_batch: true}}"
        yield setting, {"sync_each_batch": True}
    if "8bit" not in layout.optim and layout.engine != "zero3":
        yield f"optim={LEAN_OPTIMIZER}", {"optim": LEAN_OPTIMIZER}
