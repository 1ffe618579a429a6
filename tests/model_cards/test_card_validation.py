import pytest

from upcycled_moe.model_cards.validation import MAX_CARD_BYTES, card_problems


VALID = """\
---
license: apache-2.0
language: [en, zh-Hant, multilingual]
base_model: [Qwen/Qwen2.5-0.5B, gpt2]
base_model_relation: merge
datasets: HuggingFaceFW/fineweb
pipeline_tag: text-generation
tags: [moe, "arxiv:2509.00679"]
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {name: copa, type: aps/super_glue}
    metrics: [{type: acc, value: 0.5}]
---
# Text
"""


def test_nothing_is_wrong_with_a_valid_card():
    assert card_problems(VALID) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("apache-2.0", "apache2", "license: 'apache2' is not in the Hub's list; take 'other'"),
        ("apache-2.0", "other", "license: 'other' needs a license_name."),
        ("[en,", "[no,", "language: False is not the code of a language"),
        ("[en,", "[english,", "language: 'english' is not the code of a language"),
        ("gpt2", "a/b/c", "base_model: 'a/b/c' is not the id of a repository"),
        ("relation: merge", "relation: upcycled", "base_model_relation: 'upcycled' is not known to the Hub; allowed:"),
        ("HuggingFaceFW/fineweb", "./text", "datasets: './text' is not the id"),
        ("text-generation\ntags", "generation\ntags", "pipeline_tag: 'generation' is not known to the Hub"),
        ("[moe,", "[1,", "tags: 1 is not a word."),
        ("value: 0.5", "value: .nan", "model-index: acc of copa is nan instead of a number."),
        ("dataset: {name", "set: {name", "metadata: cannot be read (Invalid `model_index`"),
        ("license: apache-2.0", "license: [", "metadata: cannot be read"),
        (
            "---\n# Text",
            "---\n![a](figures/a.png) ![b](https://example.org/b.png)",
            "picture: figures/a.png is not in",
        ),
        ("# Text", "x" * MAX_CARD_BYTES, "card: has "),
    ],
)
def test_each_problem_is_one_line_with_its_field(tmp_path, old, new, problem):
    text = VALID.replace(old, new, 1)
    assert text != VALID
    (found,) = card_problems(text, tmp_path)
    assert found.startswith(problem)
    assert "\n" not in found


def test_a_picture_that_is_there_is_no_problem(tmp_path):
    (tmp_path / "a.png").touch()
    assert card_problems(VALID + "![a](a.png)\n", tmp_path) == []
