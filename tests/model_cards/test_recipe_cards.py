import pytest
from recipe_cards import FOLDER, RECIPES, recipe_card

from upcycled_moe.model_cards.validation import card_problems


@pytest.mark.parametrize("name", RECIPES)
def test_a_finished_card_is_what_its_recipe_makes(name):
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert text == recipe_card(name), "write it anew with `python tests/model_cards/recipe_cards.py`"
    assert card_problems(text) == []
    assert f"upcycled-moe convert ./moe --recipe {name}\n" in text


def test_no_card_is_left_over():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(RECIPES)
