"""PNGs of the main charts."""

import numpy as np
import pytest
from synthetic_reports import make_report

from upcycled_moe.analysis.report.pictures import write_pictures


pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")


def test_each_picture_is_there_with_a_white_background(tmp_path):
    write_pictures(make_report(names=("a $x_$", "b")), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("overview.png", "routing_weights.png", "load.png", "co_activation.png"),
        *("expert_output_similarity.png", "parent_divergence.png", "router_saturation.png"),
    }
    for name in names:
        pixels = np.array(image_module.open(tmp_path / name).convert("RGB"))
        height, width = pixels.shape[:2]
        assert width >= 700, name
        assert height >= 300, name
        assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all(), name
        assert pixels.std() > 10, name


def test_nothing_is_drawn_of_what_is_not_there(tmp_path):
    report = make_report(names=("a",), num_layers=1)
    report.checkpoints[0].measures = {"routing": report.checkpoints[0].measures["routing"]}
    report.checkpoints[0].measures["routing"].tables = {}
    write_pictures(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"overview.png"}
