"""Merged experts: neurons find their places, and weights are the weighted mean."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.streaming import contents
from upcycled_moe.common.streaming.stored import read_tensors
from upcycled_moe.pruning.alignment import FusedExperts, check_assignment, merged_expert, neuron_order


HIDDEN, WIDTH = 10, 14


@pytest.fixture
def experts(tmp_path):
    """`experts(gate_up, down)`: these tensors in a file."""

    def write(gate_up, down):
        save_file({"gate_up": gate_up.contiguous(), "down": down.contiguous()}, tmp_path / "model.safetensors")
        tensors = read_tensors(tmp_path)
        return FusedExperts(tensors["gate_up"], tensors["down"])

    return write


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, 2 * WIDTH, HIDDEN, generator=generator),
        torch.randn(3, HIDDEN, WIDTH, generator=generator),
        torch.randperm(WIDTH, generator=generator),
    )


def _permuted(gate_up, down, order):
    return torch.cat((gate_up[:WIDTH][order], gate_up[WIDTH:][order])), down[:, order]


def _written(parts):
    return torch.cat([part() for part in parts])


def test_the_order_of_the_neurons_is_found(experts, drawn):
    gate_up, down, order = drawn
    gate_up[1], down[1] = _permuted(gate_up[0], down[0], order)
    stored = experts(gate_up, down)
    assert torch.equal(order[neuron_order(stored.neurons(0), stored.neurons(1))], torch.arange(WIDTH))


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_each_matrix_can_tell_the_neurons_apart(experts, drawn, name):
    gate_up, down, order = drawn
    gate_up, down = gate_up[:1].repeat(2, 1, 1), down[:1].repeat(2, 1, 1)
    views = {"gate": gate_up[:, :WIDTH], "up": gate_up[:, WIDTH:], "down": down}
    for other in views.keys() - {name}:
        views[other].zero_()
    gate_up[1], down[1] = _permuted(gate_up[0], down[0], order)
    stored = experts(gate_up, down)
    assert torch.equal(order[neuron_order(stored.neurons(0), stored.neurons(1))], torch.arange(WIDTH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_merged_with_itself_in_another_order_is_that_expert(experts, drawn, dtype):
    gate_up, down, order = drawn
    gate_up[2], down[2] = _permuted(gate_up[0], down[0], order)
    stored = experts(gate_up.to(dtype), down.to(dtype))
    merged = merged_expert(stored, [0, 2], torch.tensor([0.5, 0.2, 0.3]).double())
    assert torch.equal(_written(merged.gate_up_parts()).to(dtype), gate_up[0].to(dtype))
    assert torch.equal(_written(merged.down_parts()).to(dtype), down[0].to(dtype))


def test_weights_are_frequencies_and_blocks_change_nothing(experts, drawn, monkeypatch):
    gate_up, down, order = drawn
    # So near each other that the order is sure.
    gate_up[1], down[1] = _permuted(gate_up[0] * 1.1, down[0] * 1.1, order)
    monkeypatch.setattr(contents, "BLOCK_ELEMENTS", 3 * HIDDEN)
    merged = merged_expert(experts(gate_up, down), [1, 0], torch.tensor([0.15, 0.45, 0.4]).double())
    assert len(merged.gate_up_parts()) > 1
    # In the order of the first of the group.
    expected_gate_up, expected_down = _permuted(gate_up[0].double(), down[0].double(), order)
    factor = (0.15 + 0.45 * 1.1) / 0.6
    torch.testing.assert_close(_written(merged.gate_up_parts()), expected_gate_up * factor, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(_written(merged.down_parts()), expected_down * factor, rtol=1e-6, atol=1e-7)


def test_what_is_never_selected_changes_nothing(experts, drawn):
    gate_up, down, _ = drawn
    assert merged_expert(experts(gate_up, down), [0, 1], torch.tensor([0.5, 0.0, 0.5]).double()) is None


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"needs SciPy: pip install 'upcycled-moe\[pruning\]'"):
        check_assignment()
