"""Router figures as keys of a log."""

from upcycled_moe.train.monitoring.metrics import mean_over_layers, router_log


LAYERS = {
    1: {"load": [0.25, 0.75], "entropy": 0.5, "dead_experts": 0},
    12: {"load": [0.0, 1.0], "entropy": 0.1, "dead_experts": 1},
}


def test_each_figure_of_a_layer_has_its_key_but_the_loads():
    assert router_log(LAYERS) == {
        "router/layer_01/entropy": 0.5,
        "router/layer_01/dead_experts": 0,
        "router/layer_12/entropy": 0.1,
        "router/layer_12/dead_experts": 1,
    }


def test_means_over_layers_leave_out_the_loads():
    assert mean_over_layers(LAYERS) == {"router/entropy": 0.3, "router/dead_experts": 0.5}
