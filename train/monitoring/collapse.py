"""Says which layers' routing has collapsed.

Dimensions: E experts to choose from, k experts that a token gets on average.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


# With fewer selections than so many an expert, chance alone leaves experts without a token.
MIN_SELECTIONS_PER_EXPERT = 100
# Layers that a warning describes; it names all.
MAX_DESCRIBED = 3
# Judgements in a row that must agree before anything is said: routing of a few batches is uneven now and then.
NUM_JUDGEMENTS = 2


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
    """Follows the loads of each layer, added up over as many logs as it takes to judge them, and then anew.

    A layer has collapsed if its `evenness` is below `threshold`, or half of its experts or more got no token.

    Args:
        threshold: from 0, with which only experts without a token count, to 1.
        first_step: logs up to this step, e.g. those of the warm-up, are passed over.
    """

    def __init__(self, threshold: float, first_step: int = 0):
        self.threshold = threshold
        self.first_step = first_step
        self._collapsed: set[int] = set()
        # In how many judgements in a row a layer was otherwise than it was last said to be.
        self._num_changed: dict[int, int] = {}
        # Tokens, and how often each expert was selected, since a layer was judged last.
        self._sums: dict[int, tuple[float, list[float]]] = {}

    def observe(self, step: int, num_tokens: float, layers: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
        """Yield what there is to say of a log: the layers that have collapsed since, and those that have recovered.

        Args:
            num_tokens: tokens that the figures are over.
            layers: `RouterStatistics.metrics` of each MoE layer, by its index in the model.
        """
        if step <= self.first_step:
            return
        selections = {layer: self._enough_selections(layer, layers[layer], num_tokens) for layer in layers}
        changed = [layer for layer, sums in selections.items() if sums and self._has_changed(layer, *sums)]
        self._collapsed.symmetric_difference_update(changed)
        if collapsed := [layer for layer in changed if layer in self._collapsed]:
            shown = collapsed[:MAX_DESCRIBED]
            described = "; ".join(f"layer {layer}: {_describe(selections[layer][1])}" for layer in shown)
            yield (
                f"warning: step {step}: routing has collapsed in {_names(collapsed)} ({described}); raise "
                "router_aux_loss_coef, lower router_learning_rate, or go on from an earlier checkpoint."
            )
        if recovered := [layer for layer in changed if layer not in self._collapsed]:
            yield f"step {step}: routing has recovered in {_names(recovered)}."

    def _enough_selections(
        self, layer: int, metrics: Mapping[str, Any], num_tokens: float
    ) -> tuple[float, list[float]] | None:
        """Add a log, and return tokens and selections [E] since the last time once they are enough to judge."""
        if not all(map(math.isfinite, (metrics["load_entropy"], metrics["experts_per_token"]))):
            return None
        load = metrics["load"]
        earlier_tokens, earlier = self._sums.pop(layer, (0.0, [0.0] * len(load)))
        num_selections = num_tokens * metrics["experts_per_token"]
        selected = [sum_so_far + share * num_selections for sum_so_far, share in zip(earlier, load, strict=True)]
        sums = (earlier_tokens + num_tokens, selected)
        # Shares do not add up to exactly one.
        if round(sum(selected)) >= MIN_SELECTIONS_PER_EXPERT * len(load):
            return sums
        self._sums[layer] = sums
        return None

    def _has_changed(self, layer: int, num_tokens: float, selected: Sequence[float]) -> bool:
        """Return whether the layer has been for `NUM_JUDGEMENTS` judgements what it was not before."""
        is_otherwise = self._is_collapsed(num_tokens, selected) != (layer in self._collapsed)
        self._num_changed[layer] = self._num_changed.get(layer, 0) + 1 if is_otherwise else 0
        if self._num_changed[layer] < NUM_JUDGEMENTS:
            return False
        self._num_changed[layer] = 0
        return True

    def _is_collapsed(self, num_tokens: float, selected: Sequence[float]) -> bool:
        total = sum(selected)
        load_entropy = -sum(num / total * math.log(num / total) for num in selected if num)
        is_uneven = evenness(load_entropy, total / num_tokens, len(selected)) < self.threshold
        return is_uneven or selected.count(0.0) * 2 >= len(selected)


def _names(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"


def _describe(selected: Sequence[float]) -> str:
    busiest = max(selected)
    return (
        f"expert {selected.index(busiest)} gets {busiest / sum(selected):.0%} of the selections, "
        f"{1 / len(selected):.1%} if balanced, {selected.count(0.0)} of {len(selected)} experts get none"
    )
