"""What a training run will cost: memory on each GPU, tokens, operations and hours, before it starts."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.training_args import OptimizerNames

from ..common.flops import Gpu, gpu_flops, num_experts, training_flops_per_token
from ..common.settings import SettingsError, check_keys, load_yaml
from .arguments import (
    DataArguments,
    EngineArguments,
    ModelArguments,
    MonitoringArguments,
    RecipeArguments,
    build_group,
)
from .checks import (
    accumulation_steps,
    batches_at_a_time,
    check_context_parallelism,
    check_dimensions,
    check_least_values,
    check_monitoring,
    check_num_processes,
    check_schedule,
    check_sharding_at_load,
)
from .memory import Layout, MemoryEstimate, Weights, estimate_memory, weights_of
from .model import LOSS_CHUNK_TOKENS


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ENGINES = {"NO": "ddp", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "FSDP": "fsdp2", "DEEPSPEED": "zero3"}
LEAN_OPTIMIZER = "adamw_bnb_8bit"
MAX_PROCESSES = 4096


@dataclass(frozen=True)
class TrainingPlan:
    """A run that is planned.

    Args:
        config, weights: of the model that is trained.
        max_steps: optimizer steps; None if they are not settled yet.
        flops_per_token: operations of forward and backward pass.
        gpu_memory_bytes: memory of a GPU, if that is known.
        peak_flops_per_device: FLOP/s that a GPU can do at best, if that is known.
        utilization: share of that peak that the run is assumed to reach.
    """

    config: Any
    weights: Weights
    layout: Layout
    max_steps: int | None
    flops_per_token: int
    gpu_memory_bytes: int | None
    peak_flops_per_device: float | None
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
        num_blocks = layout.micro_batch_size * layout.gradient_accumulation_steps * _num_batches(layout)
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
        """Hours of all steps, without evaluation and saving; None on a GPU whose peak is not known."""
        if self.peak_flops_per_device is None or self.total_flops is None:
            return None
        flops_per_second = self.peak_flops_per_device * self.utilization * self.layout.num_processes
        return self.total_flops / flops_per_second / 3600

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
            "peak_flops_per_device": self.peak_flops_per_device,
            "assumed_mfu": self.utilization,
            "hours_at_assumed_mfu": self.hours,
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
        settings: of the run, as `arguments.parse_settings` gives them; a `peak_flops_per_device` wins over that of
            `gpu`.
        accelerate: configuration of `accelerate launch`, as in `configs/accelerate/`.

    Raises:
        SettingsError: if they do not go together, or ask for an engine that is not estimated.
    """
    layout = layout_of(config, settings, accelerate)
    promised = gpu_flops(gpu, layout.mixed_precision or layout.weight_dtype) if gpu is not None else None
    max_steps = settings.get("max_steps", RecipeArguments.max_steps)
    return TrainingPlan(
        config=config,
        weights=weights_of(config),
        layout=layout,
        max_steps=max_steps if max_steps > 0 else None,
        flops_per_token=training_flops_per_token(config, layout.sequence_length),
        gpu_memory_bytes=gpu_memory_bytes if gpu_memory_bytes or gpu is None else round(gpu.memory_gb * 10**9),
        peak_flops_per_device=settings.get("peak_flops_per_device") or promised,
        utilization=utilization,
    )


def layout_of(config: Any, settings: Mapping[str, Any], accelerate: Mapping[str, Any]) -> Layout:
    """Return the layout that the settings of a run and the configuration of `accelerate launch` make together.

    Raises:
        SettingsError: as [`plan_training`].
    """
    _check_settings(settings)
    parallelism = {
        name.removeprefix("parallelism_config_"): value
        for name, value in (accelerate.get("parallelism_config") or {}).items()
    }
    sizes = {name.removesuffix("_size"): value for name, value in parallelism.items() if name.endswith("_size")}
    fsdp = {name.removeprefix("fsdp_"): value for name, value in (accelerate.get("fsdp_config") or {}).items()}
    upcycled = hasattr(config, "router_type")

    def setting(name: str, group: type) -> Any:
        return settings.get(name, getattr(group, name))

    layout = Layout(
        num_processes=accelerate.get("num_processes") or 1,
        tensor_parallel_size=setting("tensor_parallel_size", EngineArguments),
        expert_parallel_size=setting("expert_parallel_size", EngineArguments),
        context_parallel_size=sizes.get("cp", 1),
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
        loss_chunk_tokens=_loss_chunk_tokens(setting("loss_chunk_tokens", ModelArguments), config),
        separates_documents=setting("document_mask", DataArguments),
        float32_routers=upcycled and setting("router_dtype", ModelArguments) != "model",
    )
    num_processes = layout.num_processes
    check_least_values({"num_processes": num_processes})
    check_num_processes(settings.get("expected_processes"), num_processes)
    check_dimensions(sizes, num_processes)
    check_context_parallelism(
        layout.context_parallel_size, layout.sequence_length, setting("document_mask", DataArguments)
    )
    engine = _engine(accelerate, fsdp)
    if layout.tensor_parallel_size > 1 or layout.expert_parallel_size > 1:
        check_sharding_at_load(
            layout.tensor_parallel_size,
            layout.expert_parallel_size,
            num_processes,
            has_engine=engine != "ddp" or bool(parallelism),
            load_best_model_at_end=bool(settings.get("load_best_model_at_end")),
        )
        engine = "load"
    # Where processes hold copies, or share a sequence: FSDP2 shards over the latter too, over the former not.
    is_laid_out = any(size > 1 for size in sizes.values())
    shard_size = sizes.get("dp_shard", 1) * layout.context_parallel_size if is_laid_out else None
    steps = accumulation_steps(
        settings.get("tokens_per_step"),
        settings.get("gradient_accumulation_steps", 1),
        layout.sequence_length,
        layout.micro_batch_size,
        _num_batches(layout),
    )
    return replace(layout, engine=engine, shard_size=shard_size, gradient_accumulation_steps=steps)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Check what a run would refuse, and that nothing is asked for that is not estimated.

    Raises:
        SettingsError: at the first such setting.
    """
    check_least_values(settings)
    # -1, the default, is none given.
    if (max_steps := settings.get("max_steps", RecipeArguments.max_steps)) < 1 and max_steps != -1:
        raise SettingsError(f"max_steps={max_steps} must be at least 1.")
    check_schedule(build_group(RecipeArguments, settings))
    check_monitoring(build_group(MonitoringArguments, settings))
    for name, allowed in (
        ("optim", [optimizer.value for optimizer in OptimizerNames]),
        ("lr_scheduler_type", [scheduler.value for scheduler in SchedulerType]),
        ("attn_implementation", ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]),
        ("experts_implementation", ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]),
    ):
        value = settings.get(name)
        # A slash is in the name of a kernel on the Hub.
        if value is not None and value not in allowed and "/" not in value:
            raise SettingsError(f"{name}={value} is not known; allowed: {', '.join(sorted(allowed))}.")
    for name in ("fsdp", "fsdp_config", "deepspeed"):
        if settings.get(name):
            raise SettingsError(
                f"{name}={settings[name]} as a setting of the run is not estimated; give the plan a configuration of "
                "accelerate launch instead, such as configs/accelerate/fsdp2.yaml."
            )


def _engine(accelerate: Mapping[str, Any], fsdp: Mapping[str, Any]) -> str:
    """Return the engine that the launcher runs.

    Raises:
        SettingsError: if it is not estimated.
    """
    # YAML reads a bare `NO` as false.
    kind = str(accelerate.get("distributed_type") or "NO").upper()
    if kind not in ENGINES:
        raise SettingsError(f"distributed_type={kind} is not estimated; allowed: {', '.join(ENGINES)}.")
    deepspeed = accelerate.get("deepspeed_config") or {}
    if kind == "DEEPSPEED":
        if file := deepspeed.get("deepspeed_config_file"):
            raise SettingsError(f"deepspeed_config_file={file} is not estimated; give zero_stage: 3 in its place.")
        if (stage := deepspeed.get("zero_stage")) != 3:
            raise SettingsError(f"deepspeed_config: zero_stage={stage} is not estimated; only 3 is.")
        for name in ("offload_optimizer_device", "offload_param_device"):
            if (device := str(deepspeed.get(name) or "none")) != "none":
                raise SettingsError(f"{name}={device} is not estimated; plan with none.")
    if kind == "FSDP":
        if (version := fsdp.get("version", 1)) != 2:
            raise SettingsError(f"fsdp_version={version} is not estimated; only 2 is, as in fsdp2.yaml.")
        for name in ("offload_params", "activation_cpu_offload", "activation_checkpointing_offload"):
            if fsdp.get(name):
                raise SettingsError(f"fsdp_{name}={fsdp[name]} is not estimated; plan with false.")
    return ENGINES[kind]


def _num_batches(layout: Layout) -> int:
    return batches_at_a_time(layout.num_processes, layout.tensor_parallel_size, layout.context_parallel_size)


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


def _loss_chunk_tokens(given: int | None, config: Any) -> int | None:
    upcycled = hasattr(config, "router_type")
    if given and not upcycled:
        raise SettingsError(
            f"loss_chunk_tokens={given}, but {config.model_type} models know no such loss; leave it out."
        )
    if given is None:
        return LOSS_CHUNK_TOKENS if upcycled else None
    return given or None


def _syncs_each_batch(settings: Mapping[str, Any]) -> bool:
    options = settings.get("accelerator_config")
    options = load_yaml(options) if isinstance(options, str) else options or {}
    return (options.get("gradient_accumulation_kwargs") or {}).get("sync_each_batch", True)


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
