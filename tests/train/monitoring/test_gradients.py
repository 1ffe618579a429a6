"""Norms of gradients by group."""

import pytest
import torch

from upcycled_moe.train.monitoring.gradients import gradient_norms


def test_norms_are_those_of_each_groups_gradients_together():
    parameters = {
        name: torch.nn.Parameter(torch.zeros(3))
        for name in (
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.1.self_attn.k_proj.weight",
            "mlp.gate.w",
        )
    }
    for number, parameter in enumerate(parameters.values(), 1):
        parameter.grad = torch.tensor([1.0, 2.0, 2.0]) * number
    frozen = {"model.norm.weight": torch.nn.Parameter(torch.zeros(3))}
    norms = gradient_norms({**parameters, **frozen}.items())
    assert {name: norm.item() for name, norm in norms.items()} == {
        "attention": pytest.approx((9 + 36) ** 0.5),
        "routers": pytest.approx(9.0),
    }
