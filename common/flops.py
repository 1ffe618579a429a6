"""How much a model computes, and how much a GPU can.

Dimensions: H hidden size, S sequence, K experts of a token.

Conventions, those of PaLM (arXiv 2204.02311, appendix B): two operations for each weight of a matrix that a token is
multiplied with, the backward pass costs twice the forward pass, activation checkpointing repeats work that counts only
once, and each token attends to all S positions, although a causal mask hides half of them. Norms, biases and the
embedding, which is looked up, count nothing. Model FLOPs utilisation (MFU) is `tokens per second × training FLOPs per
token ÷ peak FLOPs of all devices`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from modeling_upcycled_moe.routers_upcycled_moe import ROUTERS


BACKWARD_TO_FORWARD = 2


def training_flops_per_token(config: Any, sequence_length: int) -> int:
    """Return the operations of one token in a training step, forward and backward, in sequences of that many tokens.

    Args:
        config: of one of this package's models, of a dense Qwen2 or Qwen3 one, of Qwen2-MoE, Qwen3-MoE or Mixtral.
        sequence_length: S; a layer with a sliding window attends to no more than that.
    """
    return (1 + BACKWARD_TO_FORWARD) * forward_flops_per_token(config, sequence_length)


def forward_flops_per_token(config: Any, sequence_length: int = 0) -> int:
    """Return the operations of one token's forward pass; without `sequence_length` those of the weights alone.

    At most: if a token takes experts without computation, or fewer experts than it may (`top_p`), it costs less.
    """
    layers = sum(
        _attention_flops(config, layer_idx, sequence_length) + _ffn_flops(config, is_moe)
        for layer_idx, is_moe in enumerate(moe_pattern(config))
    )
    return layers + 2 * head_weights(config)


def attention_weights(config: Any) -> int:
    """Return the weights of a layer's four attention matrices."""
    return 2 * config.hidden_size * head_size(config) * (config.num_attention_heads + config.num_key_value_heads)


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def head_weights(config: Any) -> int:
    """Return the weights of the output matrix, whether or not it is the embedding too."""
    architecture = (getattr(config, "architectures", None) or ["ForCausalLM"])[0]
    if architecture.endswith("ForCausalLM"):
        return config.vocab_size * config.hidden_size
    return config.num_labels * config.hidden_size * architecture.endswith("ForSequenceClassification")


def moe_pattern(config: Any) -> Iterator[bool]:
    """Yield for each decoder layer whether it has experts."""
    for layer_idx in range(config.num_hidden_layers):
        yield num_experts(config) > 0 and (
            layer_idx not in (getattr(config, "mlp_only_layers", None) or [])
            and (layer_idx + 1) % getattr(config, "decoder_sparse_step", 1) == 0
        )


def num_experts(config: Any) -> int:
    """Return how many experts with computation a MoE layer has; 0 for a dense model."""
    return getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0


def expert_size(config: Any) -> int:
    """Return the intermediate width of a routed expert."""
    return getattr(config, "moe_intermediate_size", None) or config.intermediate_size


def _attention_flops(config: Any, layer_idx: int, sequence_length: int) -> int:
    layer_types = getattr(config, "layer_types", None)
    num_attended = sequence_length
    if layer_types and layer_types[layer_idx] == "sliding_attention":
        num_attended = min(sequence_length, config.sliding_window)
    # One product for the scores, one for the sum of the values weighted by them.
    scores = 2 * num_attended * config.num_attention_heads * head_size(config)
    return 2 * (attention_weights(config) + scores)


def _ffn_flops(config: Any, is_moe: bool) -> int:
    if not is_moe:
        return 2 * 3 * config.hidden_size * config.intermediate_size
    num_active = min(config.num_experts_per_tok, num_experts(config))
    weights = num_active * 3 * config.hidden_size * expert_size(config)
    if shared_size := getattr(config, "shared_expert_intermediate_size", 0):
        weights += 3 * config.hidden_size * shared_size
        if getattr(config, "shared_expert_gating", "sigmoid") == "sigmoid":
            weights += config.hidden_size
    return 2 * weights + router_flops_per_token(config)


def router_flops_per_token(config: Any) -> int:
    """Return the operations of one router for one token."""
    if hasattr(config, "router_type"):
        with torch.device("meta"):
            return ROUTERS[config.router_type](config).flops_per_token
    return 2 * config.hidden_size * num_experts(config)


@dataclass(frozen=True)
class Gpu:
    """What the maker promises of a GPU.

    Args:
        names: words of the name that the driver gives, in lower case; all of them are in it.
        half_tflops: dense tensor-core peak in bfloat16 and float16 with float32 sums, 10^12 operations a second;
            TF32 has half of it.
        single_tflops: peak in float32 without TF32.
        memory_gb: all that CUDA shows of its memory (`total_memory`), in 10^9 bytes, where that is known here, else
            what the maker calls it.
        other_words: those that may be in its name too, beside `COMMON_WORDS`; any other is of another GPU.
    """

    names: tuple[str, ...]
    half_tflops: float
    single_tflops: float
    memory_gb: float
    other_words: tuple[str, ...] = ()


# In names of the same GPU: who makes it, its series, how it is connected.
COMMON_WORDS = {
    *("nvidia", "amd", "tesla", "geforce", "instinct", "generation"),
    *("sxm4", "sxm5", "pcie", "oam", "hbm2", "hbm2e", "hbm3", "hbm3e"),
}

# NVIDIA's data sheets and architecture white papers (figures "with sparsity" halved): H100, H200, GH200, A100, A40,
# A30, A10, L40S, L40, L4, DGX B200 and GB200 NVL72 (per GPU), Ada (RTX 4090, RTX 6000 Ada), Ampere GA102 (RTX 3090,
# RTX A6000) and Blackwell (RTX 5090); AMD's data sheet for MI300X. The first that matches counts.
# Of H100, A100 (79.1 GiB, 39.4 GiB) and H200 (139.8 GiB) the memory is that which CUDA shows.
GPUS = {
    "gb200": Gpu(("gb200",), 2500, 80, 186),
    "b200": Gpu(("b200",), 2250, 75, 180),
    "gh200": Gpu(("gh200",), 989, 67, 96, ("480gb",)),
    "h200-nvl": Gpu(("h200", "nvl"), 835, 60, 150.1),
    "h200": Gpu(("h200",), 989, 67, 150.1),
    "h100-nvl": Gpu(("h100", "nvl"), 835, 60, 94),
    "h100-pcie": Gpu(("h100", "pcie"), 756, 51, 84.9),
    "h100": Gpu(("h100",), 989, 67, 84.9, ("80gb",)),
    "a100-40gb": Gpu(("a100", "40gb"), 312, 19.5, 42.3),
    "a100": Gpu(("a100",), 312, 19.5, 84.9, ("80gb",)),
    "rtx-6000-ada": Gpu(("rtx", "6000", "ada"), 364, 91, 48),
    "rtx-a6000": Gpu(("rtx", "a6000"), 155, 38.7, 48),
    "l40s": Gpu(("l40s",), 362, 91.6, 48),
    "l40": Gpu(("l40",), 181, 90.5, 48),
    "l4": Gpu(("l4",), 121, 30.3, 24),
    "a40": Gpu(("a40",), 150, 37.4, 48),
    "a30": Gpu(("a30",), 165, 10.3, 24),
    "a10": Gpu(("a10",), 125, 31.2, 24),
    "rtx-5090": Gpu(("rtx", "5090"), 209.5, 104.8, 32),
    "rtx-4090": Gpu(("rtx", "4090"), 165.2, 82.6, 24),
    "rtx-3090": Gpu(("rtx", "3090"), 71, 35.6, 24),
    "mi300x": Gpu(("mi300x",), 1307, 163.4, 192),
}


def find_gpu(device_name: str) -> Gpu | None:
    """Return the GPU that a driver calls `device_name`; None for an unknown one, a variant or a part (MIG) of one."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    return next(
        (
            gpu
            for gpu in GPUS.values()
            if words.issuperset(gpu.names) and words <= {*gpu.names, *gpu.other_words, *COMMON_WORDS}
        ),
        None,
    )


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Return the operations a second that the maker of `device` promises for matrices of type `dtype`.

    For float32 those with TF32 where torch is allowed to use it. None for a CPU, an unknown device, and other types.
    """
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu_flops(gpu, dtype, tf32=torch.get_float32_matmul_precision() != "highest")


def gpu_flops(gpu: Gpu, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Return the operations a second that are promised of `gpu` for matrices of type `dtype`; None for other types."""
    if dtype in (torch.bfloat16, torch.float16):
        return gpu.half_tflops * 1e12
    if dtype == torch.float32:
        return (gpu.half_tflops / 2 if tf32 else gpu.single_tflops) * 1e12
    return None
