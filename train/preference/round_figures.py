"""What is measured of each policy, on pairs that no round trains on.

The implicit reward of an answer y to x is `β ln(π_t(y|x) / π_0(y|x))`: relative to the policy that the rounds began
with, not to a round's reference, so that rounds and references compare.

Source: DPO (arXiv 2305.18290), equations 5 and 7.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import RunError


def pair_figures(
    policy: dict[str, Sequence[float]], start: dict[str, Sequence[float]], sources: Sequence[str], beta: float
) -> dict[str, Any]:
    """Return figures of a policy on N pairs.

    * `accuracy`: how often the implicit reward of the chosen answer is the higher one; a tie counts half.
    * `accuracy_error`: its standard error, of wins of 0, ½ and 1.
    * `margin`: mean difference of the two rewards; `loss`: mean of DPO's loss with π_0 as the reference.
    * `log_ratio_chosen`, `log_ratio_rejected`: means of `ln(π_t / π_0)`, in nats an answer.
    * `accuracy_by_source`: the accuracy on the pairs of each source.

    Args:
        policy, start: log-probabilities [N] under π_t and π_0 of the answers `chosen` and `rejected`.
        sources: of each pair [N].
    """
    ratios = {
        side: torch.tensor(policy[side], dtype=torch.float64) - torch.tensor(start[side], dtype=torch.float64)
        for side in ("chosen", "rejected")
    }
    margins = beta * (ratios["chosen"] - ratios["rejected"])
    wins = (margins > 0).double() + 0.5 * (margins == 0).double()
    of_source = {
        source: wins[[index for index, other in enumerate(sources) if other == source]].mean().item()
        for source in sorted(set(sources))
    }
    return {
        **_mean("accuracy", wins),
        "margin": margins.mean().item(),
        "loss": -F.logsigmoid(margins).mean().item(),
        "log_ratio_chosen": ratios["chosen"].mean().item(),
        "log_ratio_rejected": ratios["rejected"].mean().item(),
        "accuracy_by_source": of_source,
        "num_pairs": len(wins),
    }


def sample_figures(
    policy: Sequence[float], start: Sequence[float], num_tokens: Sequence[int], rewards: Sequence[float] | None
) -> dict[str, Any]:
    """Return figures of N answers that a policy drew at temperature 1.

    * `divergence`: their mean `ln(π_t / π_0)`, which estimates `KL(π_t || π_0)` without bias, in nats an answer;
      `divergence_error`: its standard error.
    * `answer_tokens`: their mean length; `reward` and `reward_error`: of the reward model.

    Args:
        policy, start: their log-probabilities [N] under π_t and π_0.
        rewards: [N], None without a reward model.

    Raises:
        RunError: if a reward is not finite.
    """
    ratios = torch.tensor(policy, dtype=torch.float64) - torch.tensor(start, dtype=torch.float64)
    figures = {**_mean("divergence", ratios), "answer_tokens": sum(num_tokens) / len(num_tokens)}
    if rewards is not None:
        if not all(map(math.isfinite, rewards)):
            raise RunError("eval_reward_model gives rewards that are not finite; give another.")
        figures |= _mean("reward", torch.tensor(rewards, dtype=torch.float64))
    return figures


def _mean(name: str, values: torch.Tensor) -> dict[str, float | None]:
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: values.mean().item(), f"{name}_error": error}


# Columns of the table, and how many decimals they have.
COLUMNS = {
    "round": 0,
    "accuracy": 4,
    "accuracy_error": 4,
    "margin": 4,
    "loss": 4,
    "log_ratio_chosen": 2,
    "log_ratio_rejected": 2,
    "divergence": 3,
    "divergence_error": 3,
    "reward": 3,
    "reward_error": 3,
}


def figures_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of what was measured, a line for each policy, and what each counts in its reference."""
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    cells = [[*names, "reference"]]
    for row in rows:
        shown = ["-" if row.get(name) is None else f"{row[name]:.{COLUMNS[name]}f}" for name in names]
        cells.append([*shown, _shown_coefficients(row.get("reference_coefficients"))])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)


def _shown_coefficients(groups: Mapping[str, Sequence[float]] | None) -> str:
    if groups is None:
        return "-"
    # Several groups, layers, by their mean.
    means = [sum(values) / len(values) for values in zip(*groups.values(), strict=True)]
    return " ".join(f"{value:.2f}" for value in means)
