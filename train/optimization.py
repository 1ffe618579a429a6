"""The optimizer's side of a step: learning rates, clipping, and steps that are left out."""

import torch
from transformers import SchedulerType

from .schedule import step_decay_schedule


class OptimizationMixin:
    """Trains with this recipe's schedule."""

    @property
    def step_was_skipped(self) -> bool:
        """Whether the step that has just ended left the weights as they were."""
        return self.accelerator.optimizer_step_was_skipped

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != SchedulerType.CONSTANT_WITH_WARMUP:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = step_decay_schedule(
            self.optimizer if optimizer is None else optimizer,
            num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            decay_points=self.args.lr_decay_points,
            decay_factor=self.args.lr_decay_factor,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler
