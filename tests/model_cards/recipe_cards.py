"""The finished cards of some packaged recipes, from plans on models of the real shapes.

Write them anew with

    python tests/model_cards/recipe_cards.py
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import Qwen2Config

from upcycled_moe.common.settings import load_yaml
from upcycled_moe.common.streaming.stored import StoredTensor
from upcycled_moe.conversion.card import planned_checkpoint
from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.recipe import build_recipe, packaged_recipes
from upcycled_moe.conversion.source import DenseSource, expected_shapes
from upcycled_moe.model_cards.card import render_card
from upcycled_moe.model_cards.extras import CardExtras


FOLDER = Path(__file__).parents[2] / "model_cards" / "recipes"
RECIPES = (
    "router_upcycling_8x0.5b",
    "router_upcycling_8x1.8b",
    "vanilla_upcycling_8x0.5b",
    "drop_upcycling",
    "fine_grained",
    "deepseek_style",
    "xft",
    "zero_computation",
    "expert_choice",
    "moe_from_scratch_8x0.5b",
)
# Hidden and intermediate size, attention and key-value heads, and whether the head is tied: from their config.json.
SHAPES = {
    "Qwen/Qwen1.5-0.5B": (1024, 2816, 16, 16, False),
    "Qwen/Qwen1.5-1.8B": (2048, 5504, 16, 16, False),
    "Qwen/Qwen2.5-0.5B": (896, 4864, 14, 2, True),
}
# From their cards.
RESEARCH_TERMS = "license: other\nlicense_name: tongyi-qianwen-research\nlanguage:\n- en"
TERMS = {
    "Qwen/Qwen1.5-0.5B": RESEARCH_TERMS,
    "Qwen/Qwen1.5-1.8B": RESEARCH_TERMS,
    "Qwen/Qwen2.5-0.5B": "license: apache-2.0\nlanguage:\n- en",
}


def recipe_card(name: str) -> str:
    """Return the card of what the packaged recipe `name` makes."""
    recipe = build_recipe((name, load_yaml(packaged_recipes()[name])))
    with TemporaryDirectory() as folder:
        plan = build_plan(dense_model(recipe.model, Path(folder)), recipe)
        return render_card(planned_checkpoint(plan), CardExtras(packaged_recipe=name))


def dense_model(name: str, folder: Path) -> DenseSource:
    """Return the dense model `name` as a plan sees it, with a `folder` that has all but its weights."""
    hidden, intermediate, heads, kv_heads, is_tied = SHAPES[name]
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=24,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=is_tied,
        architectures=["Qwen2ForCausalLM"],
    )
    (folder / "tokenizer.json").touch()
    (folder / "README.md").write_text(f"---\n{TERMS[name]}\n---\n", encoding="utf-8")
    file = folder / "model.safetensors"
    tensors = {
        tensor: StoredTensor(tensor, "BF16", shape, file, 0, 2 * math.prod(shape))
        for tensor, shape in expected_shapes(config).items()
    }
    return DenseSource(name, folder, "main", config, tensors, headers_only=True)


if __name__ == "__main__":
    for recipe_name in RECIPES:
        (FOLDER / f"{recipe_name}.md").write_text(recipe_card(recipe_name), encoding="utf-8")
