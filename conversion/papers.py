"""The papers that a model is built on, by the settings that come from them."""

from typing import Any

from .recipe import GIVEN, ConversionRecipe


VANILLA_UPCYCLING = "2212.05055"
# Setting, its value (or any but the default) and the arXiv number. First the routers: every recipe has one.
PAPERS: tuple[tuple[str, Any, str], ...] = (
    ("router", "mixture", "2509.00679"),
    ("router", "linear", VANILLA_UPCYCLING),
    ("router", "mlp", "2509.00679"),
    ("router", "grouped_average", "2401.13920"),
    ("router", "domain", "2408.15901"),
    ("expert_sources", GIVEN, "2403.07816"),
    ("experts", "drop", "2502.19261"),
    ("experts", "split", "2410.07524"),
    ("shared_expert", "plain", "2401.06066"),
    ("shared_expert", "complement", "2404.15247"),
    ("num_zero_experts", GIVEN, "2410.07348"),
    ("num_copy_experts", GIVEN, "2410.07348"),
    ("num_constant_experts", GIVEN, "2410.07348"),
    ("router_selection", "grouped_top_k", "2505.21411"),
    ("router_selection", "prototype_top_k", "2105.15082"),
    ("router_selection", "top_p", "2403.07652"),
    ("router_selection", "expert_choice", "2202.09368"),
    ("router_score_function", "sigmoid", "2412.19437"),
    ("use_router_bias", True, "2408.15664"),
    ("router_jitter_noise", GIVEN, "2101.03961"),
    ("router_z_loss_coef", GIVEN, "2202.08906"),
    ("router_entropy_loss_coef", GIVEN, "2403.07652"),
    ("router_locality_loss_coef", GIVEN, "2401.13920"),
)


def papers(recipe: ConversionRecipe) -> list[str]:
    """Return the arXiv numbers of what `recipe` asks for, each once, that of the router first."""
    defaults = ConversionRecipe()
    numbers = [
        number
        for setting, value, number in PAPERS
        if _applies(getattr(recipe, setting), value, getattr(defaults, setting))
    ]
    # A linear router at random is vanilla upcycling only if something is upcycled.
    return [
        number for number in dict.fromkeys(numbers) if not (recipe.is_from_scratch and number == VANILLA_UPCYCLING)
    ]


def _applies(actual: Any, value: Any, default: Any) -> bool:
    return actual != default if value is GIVEN else actual == value
