"""Estimated memory of a training step, held against the peaks of real steps."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from modeling_upcycled_moe import UpcycledQwenMoeConfig
from upcycled_moe.train.memory import (
    OVERHEAD_BYTES,
    Layout,
    estimate_memory,
    estimate_moments,
    num_elements,
    weights_of,
)


SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
DENSE = Qwen2Config(**SHAPE)
MOE = UpcycledQwenMoeConfig(**SHAPE, num_experts=8, num_experts_per_tok=2)
RUN = Layout(micro_batch_size=4, sequence_length=256, mixed_precision=torch.bfloat16)
LEAN = replace(RUN, gradient_checkpointing=True, loss_chunk_tokens=128)


@pytest.fixture(scope="module")
def measured_peak_bytes():
    """What the benchmark measures with."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        from memory import measured_peak_bytes
    finally:
        sys.path.remove(folder)
    return measured_peak_bytes


@pytest.mark.parametrize(
    ("config", "layout", "moment"),
    [
        (DENSE, replace(RUN, gradient_checkpointing=True), "gradient of the loss"),
        (DENSE, replace(RUN, weight_dtype=torch.bfloat16, mixed_precision=None), "gradient of the loss"),
        (MOE, replace(RUN, mixed_precision=None), "gradient of the loss"),
        (MOE, replace(RUN, loss_chunk_tokens=128), "end of the forward pass"),
        (MOE, replace(LEAN, micro_batch_size=16), "gradient of the first layer"),
        (MOE, replace(LEAN, gradient_accumulation_steps=2), "gradient of the last layer"),
        (MOE, replace(LEAN, micro_batch_size=1, optim="adamw_torch"), "optimizer's step"),
    ],
)
def test_the_estimate_is_the_peak_of_a_real_step(measured_peak_bytes, config, layout, moment):
    estimate = estimate_memory(config, layout)
    assert estimate.allocated_bytes == pytest.approx(measured_peak_bytes(config, layout, fake=True), rel=0.1)
    assert estimate.moment == moment


def test_the_parts_add_up():
    estimate = estimate_memory(MOE, RUN)
    assert sum(estimate.parts.values()) == estimate.total_bytes == estimate.to_dict()["total_bytes"]
    assert estimate.total_bytes - estimate.allocated_bytes == estimate.overhead == OVERHEAD_BYTES
    assert set(estimate.parts) == {
        *("weights", "gradients", "optimizer", "weight_copies", "activations", "loss", "communication", "overhead")
    }


def total_parameters(config):
    return num_elements(weights_of(config).shapes)


@pytest.mark.parametrize(
    ("optim", "state_bytes"),
    [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2.03125), ("sgd", 0), ("lion_8bit", 1.015625)],
)
def test_what_an_optimizer_keeps_for_each_weight(optim, state_bytes):
    estimate = estimate_memory(MOE, replace(LEAN, optim=optim))
    assert estimate.optimizer == pytest.approx(state_bytes * total_parameters(MOE), rel=1e-4)
    assert not estimate.notes


def test_adafactor_keeps_rows_and_columns():
    from transformers.optimization import Adafactor

    weight = torch.nn.Parameter(torch.ones(3, 10, 20))
    weight.grad = torch.ones_like(weight)
    optimizer = Adafactor([weight])
    optimizer.step()
    kept = sum(value.numel() for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.dim())
    assert kept == 3 * (10 + 20)
    sums = sum(
        shape[:-2].numel() * (shape[-2] + shape[-1]) if len(shape) > 1 else shape.numel()
        for shape in weights_of(MOE).shapes
    )
    assert estimate_memory(MOE, replace(LEAN, optim="adafactor")).optimizer == 4 * sums


def test_an_optimizer_that_is_not_known_is_said():
    assert "optim=apollo_adamw" in estimate_memory(MOE, replace(LEAN, optim="apollo_adamw")).notes[0]


def test_shards_are_parts_of_what_one_process_holds():
    one = estimate_memory(MOE, LEAN)
    for layout in (
        replace(LEAN, num_processes=8, engine="fsdp2"),
        replace(LEAN, num_processes=16, engine="fsdp2", shard_size=8),
    ):
        sharded = estimate_memory(MOE, layout)
        assert sharded.weights == pytest.approx(one.weights / 8, abs=8)
        assert sharded.optimizer == pytest.approx(one.optimizer / 8, abs=8)
        assert sharded.weight_copies == 0
        assert sharded.communication > 0
    copies = estimate_memory(MOE, replace(LEAN, num_processes=8))
    assert (copies.weights, copies.optimizer) == (one.weights, one.optimizer)
    assert copies.communication == 0


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 4])
def test_zero_3_holds_sixteen_bytes_of_a_weight_and_a_bucket_at_every_moment(gradient_accumulation_steps):
    """Weights and gradients in bfloat16, whose place is kept from set-up on; weights and two moments in float32."""
    layout = replace(LEAN, num_processes=4, engine="zero3", gradient_accumulation_steps=gradient_accumulation_steps)
    moments = estimate_moments(MOE, layout)
    assert len(moments) == 5
    for moment in moments:
        held = moment.weights + moment.gradients + moment.optimizer
        assert held == pytest.approx(16 * total_parameters(MOE) / 4, rel=1e-3)
        assert moment.communication >= 2 * 500_000_000
    bucket = moments[-1].communication
    assert moments[0].communication - bucket == 4 * weights_of(MOE).largest_layer
    # The gradients that the optimizer takes, in float32.
    assert moments[-1].activations == pytest.approx(4 * total_parameters(MOE) / 4, rel=1e-3)


def test_accumulation_under_fsdp_holds_the_gradients_of_all_weights_unless_each_batch_is_reduced():
    sharded = replace(LEAN, num_processes=8, engine="fsdp2", gradient_accumulation_steps=4)
    assert estimate_memory(MOE, replace(sharded, sync_each_batch=False)).gradients >= 2 * total_parameters(MOE)
    assert estimate_memory(MOE, sharded).gradients == pytest.approx(4 * total_parameters(MOE) / 8, rel=1e-3)


def test_parts_of_a_sequence_hold_parts_of_its_activations():
    parts = replace(RUN, num_processes=4, engine="fsdp2", loss_chunk_tokens=1)
    whole, quarter = estimate_memory(MOE, parts), estimate_memory(MOE, replace(parts, context_parallel_size=4))
    assert quarter.activations == pytest.approx(whole.activations / 4, rel=0.01)


def test_documents_apart_cost_a_mask_in_each_layer():
    def activations(layout):
        return estimate_memory(MOE, layout).activations

    chunked = replace(RUN, loss_chunk_tokens=1)
    flash = replace(chunked, attn_implementation="flash_attention_2")
    assert activations(replace(flash, separates_documents=True)) == activations(flash) == activations(chunked)
    # A number for each pair of positions, and keys and values repeated for all query heads.
    more_of_a_token = 2 * 256 + 2 * 2 * (128 - 64)
    masked = activations(replace(chunked, separates_documents=True))
    assert masked - activations(chunked) == 3 * 4 * 256 * more_of_a_token
