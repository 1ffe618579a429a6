"""Which pictures a card shows from beside it."""

import pytest

from upcycled_moe.model_cards.pictures import local_pictures


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("![Loads](./loads.png) ![](figures/a.PNG)", ["loads.png", "figures/a.PNG"]),
        ('![](loads.png "of experts") ![](<two words.png>)', ["loads.png", "two words.png"]),
        ("![](two%20words.jpg) ![](loads(1).png) ![](a.webp?raw=true)", ["two words.jpg", "loads(1).png", "a.webp"]),
        ("<img src='a.svg'> <IMG width=3 SRC=b.gif> <img\nsrc=\"c.png\"/>", ["a.svg", "b.gif", "c.png"]),
        ("![Loads][l] ![loads]\n\n[L]: a.png 'title'\n[loads]: <b.png>\n", ["a.png", "b.png"]),
        ("![](a.png) ![](a.png)", ["a.png"]),
        ("![](https://hf.co/a.png) ![](//hf.co/a.png) ![](data:image/png;base64,AA)", []),
        ("[link](a.png) `![](b.png)`\n\n```md\n![](c.png)\n```\n", []),
    ],
)
def test_pictures_by_a_relative_path(text, paths):
    assert sorted(local_pictures(text)) == sorted(paths)
