import numpy as np
import pytest

from upcycled_moe.overoptimization import plot
from upcycled_moe.overoptimization.plot import _labelled, write_plot
from upcycled_moe.overoptimization.results import measure_models


NAMES = ("dense", "_hidden", "cost$ and $more", "a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The figure of eight models, as it was saved."""
    generator = np.random.default_rng(0)
    gold = generator.normal(size=(60, 16))
    scores = {name: gold[None] + generator.normal(size=(1, 60, 16)) for name in NAMES}
    results = measure_models(scores, gold, baseline="dense", num_resamples=100, seed=0)
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        save = plot.save_png
        patch.setattr(plot, "save_png", lambda figure, path: figures.append(figure) or save(figure, path))
        write_plot(results, tmp_path_factory.mktemp("plot") / "curves.png")
    return results, figures[0]


def test_both_panels_show_every_model(drawn):
    results, figure = drawn
    gold, proxy = figure.axes
    lines = [line for line in gold.lines if len(line.get_xdata()) == len(results.numbers)]
    np.testing.assert_array_equal(lines[0].get_ydata(), results.oracle.gold.values)
    for name, by_gold, by_proxy in zip(NAMES, lines[1:], proxy.lines, strict=False):
        np.testing.assert_array_equal(by_gold.get_xdata(), results.kl_upper_bounds)
        np.testing.assert_array_equal(by_gold.get_ydata(), results.models[name].gold.values)
        np.testing.assert_array_equal(by_proxy.get_ydata(), results.models[name].proxy.values)
    assert len(lines) == 1 + len(NAMES)
    looks = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in lines}
    assert len(looks) == len(lines)


def test_the_legend_has_every_name(drawn):
    _, figure = drawn
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["gold itself", *(name.replace("$", r"\$") for name in NAMES)]


@pytest.mark.parametrize(
    ("numbers", "labelled"),
    [
        ([1, 2], [1, 2]),
        ([1, 2, 3, 4, 5], [1, 2, 5]),
        ([1, 2, 3, 4, 6, 8, 12, 16], [1, 2, 4, 8, 16]),
        ([*range(1, 64), 64, 100], [1, 2, 4, 8, 16, 32, 64, 100]),
    ],
)
def test_labels_of_n_do_not_crowd(numbers, labelled):
    assert _labelled(numbers) == labelled
