"""Learning rate: warm-up, then constant, then steps down near the end."""

from collections.abc import Sequence
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def learning_rate_multiplier(
    step: int, *, num_warmup_steps: int, num_training_steps: int, decay_points: Sequence[float], decay_factor: float
) -> float:
    """Return the share of the learning rate that optimizer step `step` (from 0) is made with.

    It rises linearly to 1 over `num_warmup_steps`, and is multiplied by `decay_factor` at each of `decay_points`,
    which are shares of all steps.

    Source: DeepSeekMoE (arXiv 2401.06066), section 4.1: x 0.316 at 80 % and at 90 % of the steps.
    """
    warmup = min(1.0, (step + 1) / num_warmup_steps) if num_warmup_steps else 1.0
    num_decays = sum(step >= round(point * num_training_steps) for point in decay_points)
    return warmup * decay_factor**num_decays


def step_decay_schedule(
    optimizer: Optimizer,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    decay_points: Sequence[float],
    decay_factor: float,
) -> LambdaLR:
    """Return the scheduler that applies [`learning_rate_multiplier`] to `optimizer`."""
    return LambdaLR(
        optimizer,
        partial(
            learning_rate_multiplier,
            num_warmup_steps=num_warmup_steps,
            num_training_steps=num_training_steps,
            decay_points=decay_points,
            decay_factor=decay_factor,
        ),
    )
