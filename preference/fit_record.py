"""What learning coefficients of a merge did, step by step.

Dimensions: K sources of a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .settings import FitSettings


Coefficients = Mapping[str, Sequence[float]]
# Runs whose coefficients move by less than this share of themselves have learned nothing that shows in the weights.
LEAST_MOVE = 0.01


@dataclass(frozen=True)
class FitStep:
    """An optimizer step.

    Args:
        loss: before it, the mean over its batches.
        gradient_norm: of the logits of all coefficients.
        coefficients: after it, [K] by group.
    """

    loss: float
    gradient_norm: float
    coefficients: Coefficients


@dataclass(frozen=True)
class FitRecord:
    """A run of `fit_coefficients`.

    Args:
        num_train, num_heldout: pairs, or blocks of text.
        initial: coefficients [K] by group before the first step.
        before, after: `loss` on held-out data, and for pairs `accuracy`: how often the chosen answer scores higher. A
            merge that is its own reference has none before: all its answers score zero.
    """

    settings: FitSettings
    num_train: int
    num_heldout: int
    initial: Coefficients
    steps: tuple[FitStep, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def final(self) -> Coefficients:
        """Coefficients [K] by group after the last step."""
        return self.steps[-1].coefficients

    @property
    def largest_move(self) -> float:
        """Largest |Δc| of any source between the beginning and the end."""
        return max(abs(after - before) for before, after in self._moves())

    @property
    def largest_relative_move(self) -> float:
        """Largest |Δc| / c of any source between the beginning and the end."""
        return max(abs(after - before) / before for before, after in self._moves() if before > 0)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        return {
            "settings": asdict(self.settings),
            "num_train": self.num_train,
            "num_heldout": self.num_heldout,
            "heldout": {"before": dict(self.before), "after": dict(self.after)},
            "largest_move": self.largest_move,
            "largest_relative_move": self.largest_relative_move,
            "initial": {name: list(values) for name, values in self.initial.items()},
            "final": {name: list(values) for name, values in self.final.items()},
            "steps": [asdict(step) for step in self.steps],
        }

    def _moves(self) -> Iterator[tuple[float, float]]:
        for name, values in self.initial.items():
            yield from zip(values, self.final[name], strict=True)
