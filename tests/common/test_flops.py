"""Operations of a model, counted by hand and by torch, and what GPUs promise."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from modeling_upcycled_moe import UpcycledQwenMoeConfig
from upcycled_moe.common.flops import (
    GPUS,
    find_gpu,
    forward_flops_per_token,
    gpu_flops,
    peak_flops,
    training_flops_per_token,
)


SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=32),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=80, mlp_only_layers=[1]),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=32, decoder_sparse_step=2),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "mixture": lambda: UpcycledQwenMoeConfig(**SHAPE, **EXPERTS),
    "max": lambda: UpcycledQwenMoeConfig(**SHAPE, **EXPERTS, router_pooling="max", num_routers=2),
    "mlp": lambda: UpcycledQwenMoeConfig(
        **SHAPE, **EXPERTS, router_type="mlp", shared_expert_intermediate_size=96, mlp_only_layers=[0]
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_that_torch_counts(name):
    """Eager attention and experts multiply whole matrices, which torch's own counter sees one by one."""
    config, sequence_length = CONFIGS[name](), 16
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = AutoModelForCausalLM.from_config(config).train()
    tokens = torch.arange(2 * sequence_length).view(2, sequence_length)
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, labels=tokens).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    per_token = (forward.get_total_flops() / tokens.numel(), backward.get_total_flops() / tokens.numel())
    # The rotary angles are a product of matrices too, of a few operations.
    assert forward_flops_per_token(config, sequence_length) == pytest.approx(per_token[0], rel=0.01)
    assert training_flops_per_token(config, sequence_length) == pytest.approx(sum(per_token), rel=0.02)


def test_the_scores_of_attention_grow_with_the_sequence_up_to_the_window():
    def scores(config, sequence_length):
        return forward_flops_per_token(config, sequence_length) - forward_flops_per_token(config)

    full = Qwen2Config(**SHAPE)
    assert scores(full, 100) == 3 * 4 * 100 * 64
    window = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=10, max_window_layers=2)
    assert scores(window, 100) == 2 * 4 * 100 * 64 + 4 * 10 * 64


def test_a_classifier_has_its_own_head():
    config = Qwen2Config(**SHAPE)
    classifier = Qwen2Config(**SHAPE, num_labels=3, architectures=["Qwen2ForSequenceClassification"])
    difference = forward_flops_per_token(config) - forward_flops_per_token(classifier)
    assert difference == 2 * 64 * (160 - 3)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("AMD Instinct MI300X OAM", "mi300x"),
    ],
)
def test_the_name_that_a_driver_gives_finds_the_gpu(name, gpu):
    assert find_gpu(name) is GPUS[gpu]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce GTX 1080",
        "NVIDIA RTX A1000",
        "NVIDIA RTX A4000",
        "NVIDIA RTX A400",
        "NVIDIA RTX A3000 Laptop GPU",
        "NVIDIA A10G",
        "NVIDIA A100X",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H100 96GB HBM3",
    ],
)
def test_a_name_that_only_contains_another_is_not_known(name):
    assert find_gpu(name) is None


def test_memory_is_what_cuda_shows_where_that_is_known():
    """In GiB: 79.1 of an H100 and an A100 of 80 GB, 139.8 of an H200."""
    for name, num_gib in (("h100", 79.1), ("a100", 79.1), ("a100-40gb", 39.4), ("h200", 139.8)):
        assert GPUS[name].memory_gb * 1e9 == pytest.approx(num_gib * 2**30, rel=1e-3)


def test_nothing_is_promised_of_what_is_not_known():
    assert peak_flops("cpu", torch.bfloat16) is None
    assert gpu_flops(GPUS["h100"], torch.int8) is None


def test_the_peak_follows_from_device_and_type(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops("cuda:0", torch.bfloat16) == 989e12
    assert peak_flops(torch.device("cuda"), torch.float32) == 67e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("cuda", torch.float32) == 989e12 / 2
