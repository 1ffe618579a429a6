"""Learning rate: warm-up, then constant, then steps down near the end; and routers that go first."""

from collections.abc import Callable, Collection, Sequence
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def learning_rate_multiplier(
    step: int,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    decay_points: Sequence[float],
    decay_factor: float,
    num_held_steps: int = 0,
) -> float:
    """Return the share of the learning rate that optimizer step `step` (from 0) is made with.

    It is 0 for `num_held_steps`, rises linearly to 1 over the next `num_warmup_steps`, and is multiplied by
    `decay_factor` at each of `decay_points`, which are shares of all steps.

    Source: DeepSeekMoE (arXiv 2401.06066), section 4.1: x 0.316 at 80 % and at 90 % of the steps.
    """
    if step < num_held_steps:
        return 0.0
    warmup = min(1.0, (step - num_held_steps + 1) / num_warmup_steps) if num_warmup_steps else 1.0
    num_decays = sum(step >= round(point * num_training_steps) for point in decay_points)
    return warmup * decay_factor**num_decays


def step_decay_schedule(
    optimizer: Optimizer, *, num_held_steps: int = 0, held_groups: Collection[int] = (), **schedule
) -> LambdaLR:
    """Return the scheduler that applies [`learning_rate_multiplier`] to `optimizer`.

    Args:
        num_held_steps: Steps for which the learning rate of `held_groups` is 0.
        held_groups: Positions of parameter groups in the optimizer.
        schedule: The other arguments of `learning_rate_multiplier`.
    """

    def multiplier(is_held: bool) -> Callable[[int], float]:
        return partial(learning_rate_multiplier, num_held_steps=num_held_steps if is_held else 0, **schedule)

    return LambdaLR(optimizer, [multiplier(group in held_groups) for group in range(len(optimizer.param_groups))])
