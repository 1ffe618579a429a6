"""How well scores tell chosen answers from rejected ones.

Dimensions: N pairs.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import logsigmoid


def pair_metrics(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, float]:
    """Return accuracy, mean margin and Bradley-Terry loss of the scores of N pairs; a tie is half right.

    Source: the loss is that of reward models in InstructGPT (arXiv 2203.02155), equation 1.
    """
    margins = (chosen - rejected).double()  # [N]
    return {
        "accuracy": share_of_wins(chosen, rejected),
        "margin": margins.mean().item(),
        "loss": -logsigmoid(margins).mean().item(),
    }


def share_of_wins(chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """Return the share of pairs whose chosen answer has the larger value; a tie counts half."""
    return ((chosen > rejected).double() + (chosen == rejected).double() / 2).mean().item()


def metrics_by_source(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    sources: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Return the metrics of all pairs as `""`, and those of each source by its name where there are several.

    `length_baseline` is the accuracy of the rule that the longer answer is better: a reward model that is no better
    has perhaps learned nothing else.
    """
    scores = torch.tensor([chosen, rejected], dtype=torch.float64)  # [2, N]
    lengths = torch.tensor([chosen_lengths, rejected_lengths])  # [2, N]
    names = sorted(set(sources))
    wanted = {"": list(range(len(sources)))}
    if len(names) > 1:
        wanted |= {name: [index for index, source in enumerate(sources) if source == name] for name in names}
    return {
        name: {
            **pair_metrics(*scores[:, indices]),
            "length_baseline": share_of_wins(*lengths[:, indices]),
            "pairs": len(indices),
        }
        for name, indices in wanted.items()
    }
