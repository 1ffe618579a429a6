"""What pruning did and what it cost, for people, programs and provenance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.domain_loss import DomainLoss


@dataclass(frozen=True)
class LayerResult:
    """What became of the experts of a layer.

    Args:
        index: of the decoder layer.
        scores: of every expert before, by the method; for `merge` how often it is selected.
        kept: the experts that are left, in their order.
        groups: for `merge`, what each of them is made of: first itself, then those merged into it.
    """

    index: int
    scores: Sequence[float]
    kept: Sequence[int]
    groups: Sequence[Sequence[int]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON; scores have 6 digits."""
        content = {
            "layer": self.index,
            "kept": list(self.kept),
            "scores": [float(f"{score:.6g}") for score in self.scores],
        }
        return content if self.groups is None else content | {"groups": [list(group) for group in self.groups]}


@dataclass(frozen=True)
class Losses:
    """How well a model predicts the text.

    Args:
        overall: over all targets, whatever their domain.
        domains: by domain.
    """

    overall: DomainLoss
    domains: dict[str, DomainLoss]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return _as_json(self.overall) | {"domains": {name: _as_json(loss) for name, loss in self.domains.items()}}


def _as_json(loss: DomainLoss) -> dict[str, Any]:
    # JSON has no infinity.
    perplexity = loss.perplexity if math.isfinite(loss.perplexity) else None
    return {"mean": loss.loss, "stderr": loss.stderr, "perplexity": perplexity, "num_tokens": loss.num_tokens}


@dataclass
class PruneResult:
    """All that there is to say of it.

    Args:
        folder: that was written; None for a dry run.
        settings: method, numbers of experts, and text, as they go into provenance.
        layers: the MoE layers.
        calibration_tokens: that the scores are from, by domain.
        num_bytes: of all weights of the new model.
        total_parameters: of the new model, and of them `active_parameters` for a token.
        before: the loss of the checkpoint; None where it is not measured.
        after: that of the result.
        notes: sentences for the reader.
    """

    folder: Path | None
    settings: dict[str, Any]
    layers: list[LayerResult]
    calibration_tokens: dict[str, int]
    num_bytes: int
    total_parameters: int
    active_parameters: int
    before: Losses | None = None
    after: Losses | None = None
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Return what provenance says of it."""
        return self.settings | {
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
            "calibration_tokens": self.calibration_tokens,
            "loss": {
                name: None if losses is None else losses.to_dict()
                for name, losses in (("before", self.before), ("after", self.after))
            },
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "num_bytes": self.num_bytes,
            **self.facts(),
            "notes": self.notes,
        }
