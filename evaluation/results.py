"""What an evaluation found, as it is written to `results.json` and shown."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..common.domain_loss import DomainLoss


RESULTS_FORMAT = 1


@dataclass(frozen=True)
class Score:
    """A mean over items and its standard error, None where there is none."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Average:
    """The mean of several tasks.

    Args:
        tasks: over which it is.
        missing: those that belong to it by the paper, and were not evaluated.
    """

    score: Score
    tasks: list[str]
    missing: list[str]


@dataclass(frozen=True)
class TaskInfo:
    """A task, the same for all checkpoints.

    Args:
        metric: the figure that stands for it in tables and averages.
        num_items: that were evaluated.
        num_available: in the data.
        chance: what guessing gives; None where that is not known.
        offline: whether its data was read from local files, and not from the Hub.
        version: of the harness's task; None if it has none.
    """

    name: str
    metric: str
    num_items: int
    num_available: int
    chance: float | None
    offline: bool
    version: str | None


@dataclass(frozen=True)
class Differences:
    """How much more a checkpoint scores than the first one, and the standard error of that.

    Both answer the same items and read the same blocks, so errors are of the differences of these, one by one.

    Args:
        tasks: of the figure that stands for a task, where it is an accuracy.
        averages: by name.
        domains: in bits per byte; without an error where tokenizers differ, as blocks do then.
    """

    tasks: dict[str, Score] = field(default_factory=dict)
    averages: dict[str, Score] = field(default_factory=dict)
    domains: dict[str, Score] = field(default_factory=dict)


@dataclass
class CheckpointResult:
    """What was found for one checkpoint.

    Args:
        name: what tables call it, different for each.
        path: folder or Hub id.
        dtype: of its weights, as computed with.
        tokenizer: digest; checkpoints with the same one saw the same tokens.
        tasks: by task, all its figures.
        averages: by name.
        num_truncated: by task, items whose prompt was cut from the left to fit into the model's positions.
        num_new_tokens: by task that answers are written for, how many tokens one may have.
        domains: by domain.
        documents_alone: whether the model read documents one at a time, as it does not tell those of a block apart;
            None without text.
        differences: from the first checkpoint; None for that.
    """

    name: str
    path: str
    revision: str | None
    model_type: str
    num_parameters: int
    dtype: str
    tokenizer: str
    tasks: dict[str, dict[str, Score]] = field(default_factory=dict)
    averages: dict[str, Average] = field(default_factory=dict)
    num_truncated: dict[str, int] = field(default_factory=dict)
    num_new_tokens: dict[str, int] = field(default_factory=dict)
    domains: dict[str, DomainLoss] = field(default_factory=dict)
    documents_alone: bool | None = None
    differences: Differences | None = None


@dataclass
class EvaluationReport:
    """All that an evaluation found.

    Args:
        settings: what it was asked for.
        tasks: in the order of the tables.
        notes: sentences for the reader, such as what was left out.
        versions: of the packages.
        complete: whether all checkpoints are there that were asked for.
    """

    settings: dict[str, Any]
    tasks: list[TaskInfo]
    checkpoints: list[CheckpointResult]
    notes: list[str]
    versions: dict[str, str]
    complete: bool = True
    format: int = RESULTS_FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON, with the figures that follow from others."""
        content = asdict(self)
        for checkpoint, written in zip(self.checkpoints, content["checkpoints"], strict=True):
            for name, domain in checkpoint.domains.items():
                # JSON has no infinity.
                is_finite = math.isfinite(domain.perplexity)
                written["domains"][name] |= {
                    "perplexity": domain.perplexity if is_finite else None,
                    "bits_per_byte": domain.bits_per_byte,
                }
        return content
