"""Pictures of the routing: files, and images for those that the run reports to."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers.integrations import TensorBoardCallback, WandbCallback

from upcycled_moe.common.pictures import pixels, save_png
from upcycled_moe.train.monitoring.pictures import draw_loads, draw_saturation
from upcycled_moe.train.monitoring.routing_view import RoutingView


pytest.importorskip("matplotlib")


def test_heat_map_shows_each_expert_of_each_layer(tmp_path):
    loads = [[0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.25, 0.25]]
    figure = draw_loads([1, 3], loads, [10, 20], [[0.5, 1.5], [0.0, 1.0]])
    heat_map, lines = figure.axes[:2]
    (image,) = heat_map.get_images()
    assert image.get_array().filled(-1).tolist() == [[1, 1, 1, 1], [-1, 2, 1, 1]]
    assert [label.get_text() for label in heat_map.get_yticklabels()] == ["1", "3"]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in lines.get_lines()}
    assert drawn == {"1": [0.5, 0.0], "3": [1.5, 1.0], "mean": [1.0, 0.5]}

    save_png(figure, tmp_path / "loads.png")
    assert (tmp_path / "loads.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loads.png"]
    height, width, colours = pixels(figure).shape
    assert colours == 3
    assert min(height, width) > 100


@pytest.mark.parametrize(
    ("largest", "highest", "extend"), [(0.25, 2, "neither"), (0.3, 2.4, "neither"), (1, 4, "max")]
)
def test_one_expert_with_all_tokens_does_not_hide_what_others_get(largest, highest, extend):
    layers, num_experts = [0, 5], 8
    others = (1 - largest) / (num_experts - 1)
    figure = draw_loads(layers, [[1 / 8] * 8, [largest] + [others] * 7], [10], [[0.0, largest * 8 - 1]])
    heat_map = figure.axes[0]
    (image,) = heat_map.get_images()
    assert (image.norm.vmin, image.norm.vcenter, image.norm.vmax) == pytest.approx((0, 1, highest))
    assert image.colorbar.extend == extend
    assert f"largest: {largest * 8:.2g} × the balanced one, in layer 5" in heat_map.get_title(loc="left")


def test_many_layers_share_a_scale_of_colours():
    figure = draw_saturation(range(20), [0, 10], np.linspace(0, 1, 40).reshape(2, 20))
    lines, scale = figure.axes
    assert len(lines.get_lines()) == 21
    assert lines.get_legend() is None
    assert "layer" in scale.get_ylabel()


class _Writer:
    def __init__(self):
        self.images = {}

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC"
        self.images[tag, step] = image


def test_pictures_go_to_tensorboard_and_wandb(tmp_path):
    tensorboard, wandb = (object.__new__(callback) for callback in (TensorBoardCallback, WandbCallback))
    tensorboard.tb_writer, logged = _Writer(), []
    wandb._wandb = SimpleNamespace(Image=lambda image: ("image", image.shape), log=logged.append)
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=tmp_path),
        moe_layers=[1],
        state=SimpleNamespace(global_step=30),
        callback_handler=SimpleNamespace(callbacks=[tensorboard, wandb]),
    )
    figure = draw_saturation([1], [0, 30], [[0.5], [1.0]])
    RoutingView(trainer)._show_picture("router_saturation", figure)

    assert (tmp_path / "router_saturation.png").is_file()
    (shape,) = (image.shape for image in tensorboard.tb_writer.images.values())
    assert list(tensorboard.tb_writer.images) == [("train/router_saturation", 30)]
    assert logged == [{"train/router_saturation": ("image", shape), "train/global_step": 30}]
