"""Says which layers' routing has collapsed.

Dimensions: E experts to choose from, k experts that a token gets on average.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any


# With fewer selections than so many an expert, chance alone leaves experts without a token.
MIN_SELECTIONS_PER_EXPERT = 100
# Layers that a warning describes; it names all.
MAX_DESCRIBED = 3
# Logs in a row that must agree before anything is said: routing of a few batches is uneven now and then.
NUM_LOGS = 2


def evenness(load_entropy: float, experts_per_token: float, num_experts: int) -> float:
    """Return how evenly a layer uses its experts: 1 if all alike, 0 if every token goes to the same ones.

    That is `(H - ln k) / (ln E - ln k)` with the entropy H of the loads. As a token's experts differ from one another,
    loads are never less even than `H = ln k`.
    """
    slots = math.log(max(experts_per_token, 1.0))
    range_of_entropy = math.log(num_experts) - slots
    # Where every token gets all experts, nothing can be uneven.
    return (load_entropy - slots) / range_of_entropy if range_of_entropy > 1e-6 else 1.0


class CollapseWatch:
    """Follows the figures of each layer from log to log.

    A layer has collapsed if its `evenness` is below `threshold`, or half of its experts or more got no token.

    Args:
        threshold: from 0, with which only experts without a token count, to 1.
        first_step: logs up to this step, e.g. those of the warm-up, are passed over.
    """

    def __init__(self, threshold: float, first_step: int = 0):
        self.threshold = threshold
        self.first_step = first_step
        self._collapsed: set[int] = set()
        # In how many logs in a row a layer was otherwise than it was last said to be.
        self._num_changed: dict[int, int] = {}

    def observe(self, step: int, num_tokens: float, layers: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
        """Yield what there is to say of a log: the layers that have collapsed since, and those that have recovered.

        Args:
            num_tokens: tokens that the figures are over.
            layers: `RouterStatistics.metrics` of each MoE layer, by its index in the model.
        """
        if step <= self.first_step:
            return
        changed = [layer for layer in layers if self._has_changed(layer, layers[layer], num_tokens)]
        self._collapsed.symmetric_difference_update(changed)
        if collapsed := [layer for layer in changed if layer in self._collapsed]:
            described = "; ".join(f"layer {layer}: {_describe(layers[layer])}" for layer in collapsed[:MAX_DESCRIBED])
            yield (
                f"warning: step {step}: routing has collapsed in {_names(collapsed)} ({described}); raise "
                "router_aux_loss_coef, lower router_learning_rate, or go on from an earlier checkpoint."
            )
        if recovered := [layer for layer in changed if layer not in self._collapsed]:
            yield f"step {step}: routing has recovered in {_names(recovered)}."

    def _has_changed(self, layer: int, metrics: Mapping[str, Any], num_tokens: float) -> bool:
        """Return whether the layer has been for `NUM_LOGS` logs what it was not before."""
        is_collapsed = self._is_collapsed(metrics, num_tokens)
        if is_collapsed is None:
            return False
        is_otherwise = is_collapsed != (layer in self._collapsed)
        self._num_changed[layer] = self._num_changed.get(layer, 0) + 1 if is_otherwise else 0
        if self._num_changed[layer] < NUM_LOGS:
            return False
        self._num_changed[layer] = 0
        return True

    def _is_collapsed(self, metrics: Mapping[str, Any], num_tokens: float) -> bool | None:
        """Return None if the figures do not tell."""
        num_experts = len(metrics["load"])
        figures = (metrics["load_entropy"], metrics["experts_per_token"])
        if not all(map(math.isfinite, figures)):
            return None
        if num_tokens * metrics["experts_per_token"] < MIN_SELECTIONS_PER_EXPERT * num_experts:
            return None
        return evenness(*figures, num_experts) < self.threshold or metrics["dead_experts"] * 2 >= num_experts


def _names(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"


def _describe(metrics: Mapping[str, Any]) -> str:
    load = metrics["load"]
    share = max(load)
    return (
        f"expert {load.index(share)} gets {share:.0%} of the selections, {1 / len(load):.1%} if balanced, "
        f"{metrics['dead_experts']} of {len(load)} experts get none"
    )
