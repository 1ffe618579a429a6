"""What a fresh router does with real text, layer by layer."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from modeling_upcycled_moe import UpcycledQwenMoeConfig

from ..common.routing import router_metrics


@dataclass(frozen=True)
class RouterReport:
    """What the router of one layer does on the calibration text; the figures are defined in `common/routing.py`.

    Args:
        layer: index of the layer.
        logit_std: standard deviation over experts of a token's logits, as they are written.
        unscaled_logit_std: the same before `router_logit_std` scaled them.
        entropy: mean entropy of a token's routing probabilities, in nats.
        load: share of the selections that each expert gets [E].
        max_violation: largest load over the mean load, minus one.
        dead_experts: experts that get no token.
        coinciding_keys: keys that equal an earlier one; None if there are no keys. Slices of one copy share theirs,
            which counts once.
    """

    layer: int
    logit_std: float
    unscaled_logit_std: float
    entropy: float
    load: list[float]
    max_violation: float
    dead_experts: int
    coinciding_keys: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)


def report_router(
    layer: int,
    router_logits: Tensor,
    selected_experts: Tensor,
    config: UpcycledQwenMoeConfig,
    *,
    unscaled_logit_std: float,
    coinciding_keys: int | None,
) -> RouterReport:
    """Return what a router that gives `router_logits` [T, E] and `selected_experts` [T, K] does."""
    metrics = router_metrics(router_logits, selected_experts, config)
    return RouterReport(
        layer=layer,
        logit_std=metrics["logit_std"],
        unscaled_logit_std=unscaled_logit_std,
        entropy=metrics["entropy"],
        load=metrics["load"],
        max_violation=metrics["max_violation"],
        dead_experts=metrics["dead_experts"],
        coinciding_keys=coinciding_keys,
    )
