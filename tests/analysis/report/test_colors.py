"""Colours of heat maps: even, and the same in images as in cells."""

import base64
import io

import numpy as np
import pytest

from upcycled_moe.analysis.report.colors import color_at, heat_image, is_light


def _rgb(color: str) -> np.ndarray:
    return np.array(list(bytes.fromhex(color[1:])))


def test_colors_are_those_of_viridis():
    colormaps = pytest.importorskip("matplotlib").colormaps
    for share in np.linspace(0, 1, 41):
        assert _rgb(color_at(share)) == pytest.approx(255 * np.array(colormaps["viridis"](share)[:3]), abs=8)


def test_values_beyond_the_scale_have_its_ends():
    assert (color_at(-1.0), color_at(2.0)) == (color_at(0.0), color_at(1.0)) == ("#440154", "#fde725")
    assert not is_light(0.0)
    assert is_light(1.0)


def test_an_image_has_a_pixel_a_cell_and_holes_where_there_is_no_number():
    image_module = pytest.importorskip("PIL.Image")
    shares = np.array([[0.0, 0.5, 1.0], [np.nan, 0.25, 0.75]])
    kind, _, content = heat_image(shares).partition(",")
    assert kind == "data:image/png;base64"
    image = image_module.open(io.BytesIO(base64.b64decode(content)))
    pixels = np.array(image.convert("RGBA")).astype(int)
    assert pixels.shape == (2, 3, 4)
    assert (pixels[..., 3] == [[255, 255, 255], [0, 255, 255]]).all()
    for row, column in np.argwhere(~np.isnan(shares)):
        assert pixels[row, column, :3] == pytest.approx(_rgb(color_at(shares[row, column])), abs=6)
