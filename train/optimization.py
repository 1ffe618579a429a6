"""The optimizer's side of a step: learning rates, which weights move, and steps that are left out."""

import math
import sys

import torch
from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, TrainerCallback

from ..common.settings import SettingsError
from .errors import RunError
from .groups import parameter_group
from .schedule import step_decay_schedule


class OptimizationMixin:
    """Trains with this recipe's schedule, and leaves out steps whose gradient is not finite.

    Routers may have a learning rate of their own (`router_learning_rate`), and go first (`router_warmup_steps`): all
    other weights are held until then, with their gradients dropped before they are clipped or reach the optimizer.

    Where the norm of the gradients, over all processes, is NaN or infinite, no weight, optimizer state or router bias
    moves; the log takes the loss of the step before for its own, and the schedule and the text go on. After
    `max_skipped_steps` in a row the run fails. With fp16 the loss scaler does this itself, and with DeepSpeed its
    engine.

    Settings win over what a checkpoint's optimizer and schedule were made with.

    Attributes:
        num_skipped_steps: How many steps of this start were left out.
        num_skipped_in_a_row: How many of them were the last ones.
    """

    def set_up_optimization(self) -> None:
        """Prepare for the first step; after the Trainer's own set-up."""
        self.num_skipped_steps = 0
        self.num_skipped_in_a_row = 0
        self.step_was_left_out = False
        self._last_step_loss: torch.Tensor | float = 0.0
        self._num_held_steps = self.args.router_warmup_steps
        # Positions in the optimizer of the groups with the routers' parameters.
        self._router_groups: list[int] = []
        self.add_callback(_StepBeginCallback(self))

    @property
    def step_was_skipped(self) -> bool:
        """Whether the step that has just ended left the weights as they were."""
        return self.step_was_left_out or self.accelerator.optimizer_step_was_skipped

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in [`Trainer`], with groups of their own for routers that are not trained like the rest.

        Raises:
            SettingsError: if there are no routers to train so, or the optimizer has no such groups.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and (self.args.router_learning_rate is not None or self._num_held_steps):
            self._split_routers_off(optimizer, self.model if model is None else model)
        return optimizer

    def _split_routers_off(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        setting = "router_learning_rate" if self.args.router_learning_rate is not None else "router_warmup_steps"
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        if any(id(parameter) not in names for group in optimizer.param_groups for parameter in group["params"]):
            raise SettingsError(
                f"{setting} needs an optimizer with the model's own parameters, which optim={self.args.optim} has "
                "not; leave one of them out."
            )
        routers, others = [], []
        for group in optimizer.param_groups:
            is_router = [parameter_group(names[id(parameter)]) == "routers" for parameter in group["params"]]
            for part, wanted in ((routers, True), (others, False)):
                chosen = [
                    parameter for parameter, is_one in zip(group["params"], is_router, strict=True) if is_one == wanted
                ]
                if chosen:
                    part.append({**group, "params": chosen})
        if not routers:
            raise SettingsError(f"{setting} is given, but the model has no router parameters to train; leave it out.")
        for group in routers:
            if self.args.router_learning_rate is not None:
                group["lr"] = self.args.router_learning_rate
        optimizer.param_groups[:] = [*others, *routers]
        self._router_groups = list(range(len(others), len(others) + len(routers)))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != SchedulerType.CONSTANT_WITH_WARMUP:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = step_decay_schedule(
            optimizer,
            num_held_steps=self._num_held_steps,
            held_groups=set(range(len(optimizer.param_groups))) - set(self._router_groups),
            num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            decay_points=self.args.lr_decay_points,
            decay_factor=self.args.lr_decay_factor,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in [`Trainer`], but learning rates, weight decay and the like are those of this run's settings.

        Raises:
            SettingsError: if the checkpoint's optimizer is another one, or has other groups of weights.
        """
        if checkpoint is None or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return super()._load_optimizer_and_scheduler(checkpoint)
        given = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        base_learning_rates = getattr(self.lr_scheduler, "base_lrs", None)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        # What optimizers raise for the states of others.
        except (ValueError, KeyError) as error:
            raise SettingsError(self._other_optimizer(checkpoint)) from error
        for group, settings in zip(self.optimizer.param_groups, given, strict=True):
            if group.keys() - {"params"} != settings.keys():
                raise SettingsError(self._other_optimizer(checkpoint))
            group.update(settings)
        # Other schedules follow from their own last values.
        if isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler.base_lrs = base_learning_rates
            step = self.lr_scheduler.last_epoch
            shares = [multiplier(step) for multiplier in self.lr_scheduler.lr_lambdas]
            for group, peak, share in zip(self.optimizer.param_groups, base_learning_rates, shares, strict=True):
                group["lr"] = peak * share
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _other_optimizer(self, checkpoint: str) -> str:
        return (
            f"{checkpoint}: its optimizer is not that of optim={self.args.optim} with this run's groups of weights; "
            "resume with the same optim, and with router_learning_rate and router_warmup_steps given or left out as "
            "they were."
        )

    def _get_learning_rate(self) -> float:
        # Asked for after the optimizer's step and before the schedule's.
        if self._router_groups:
            self._last_router_learning_rate = self.optimizer.param_groups[self._router_groups[0]]["lr"]
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Of all that is logged only the log of training steps has both keys.
        if "loss" in logs and "learning_rate" in logs:
            if self._router_groups:
                logs["router_learning_rate"] = self._last_router_learning_rate
            if self.num_skipped_steps:
                logs["skipped_steps"] = self.num_skipped_steps
        super().log(logs, start_time)

    def begin_step(self) -> None:
        """Remember what a step that is left out must not have changed."""
        self.step_was_left_out = False
        self._loss_before = self._tr_loss.clone()
        self._figures_before = self.figures_state()

    def _clip_grad_norm(self, model):
        self._prepare_gradients(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:
            # Without clipping.
            self._prepare_gradients(model)
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self._leaves_steps_out():
            self._leave_out_unless_finite(model, grad_norm)
        return grad_norm

    def _leaves_steps_out(self) -> bool:
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        return not is_deepspeed and self.accelerator.scaler is None

    def _prepare_gradients(self, model: torch.nn.Module) -> None:
        """Drop the gradients of weights that are held, and measure the others."""
        # Transformers looks once at which gradients there are, and remembers it.
        self._has_mixed_mesh_grads(model)
        if self.state.global_step < self._num_held_steps:
            for name, parameter in model.named_parameters():
                if parameter.grad is None or parameter_group(name) == "routers":
                    continue
                if self.state.global_step == 0:
                    # With a learning rate of 0 the optimizer only begins its state: sharded ones resume from a
                    # checkpoint that has one of each weight.
                    parameter.grad.zero_()
                else:
                    parameter.grad = None
        if hasattr(self, "measure_gradient_norms"):
            self.measure_gradient_norms(model)

    def _leave_out_unless_finite(self, model: torch.nn.Module, grad_norm: torch.Tensor | float) -> None:
        """Drop all gradients if their norm is NaN or infinite, so that the optimizer has nothing to do.

        Raises:
            RunError: if that was so too many times in a row.
        """
        # All processes have the same norm. Asking for its value waits for the backward pass, once a step.
        norm = float(grad_norm)
        if math.isfinite(norm):
            self.num_skipped_in_a_row = 0
            self._last_step_loss = self._tr_loss - self._loss_before
            return
        step = self.state.global_step + 1
        self.num_skipped_steps += 1
        self.num_skipped_in_a_row += 1
        if self.num_skipped_in_a_row > self.args.max_skipped_steps:
            raise RunError(
                f"step {step}: the norm of the gradients is {norm}, in {self.num_skipped_in_a_row} steps in a row; an "
                "earlier step may have ruined the weights. Continue from a checkpoint before step "
                f"{step - self.num_skipped_in_a_row + 1} with a lower learning_rate, or raise max_skipped_steps."
            )
        if self.args.should_log:
            print(
                f"train.py: warning: step {step}: the norm of the gradients is {norm}; the step is left out and "
                f"changes no weight ({self.num_skipped_in_a_row} in a row, {self.args.max_skipped_steps} allowed).",
                file=sys.stderr,
            )
        model.zero_grad(set_to_none=True)
        self.step_was_left_out = True
        self._tr_loss = self._loss_before + self._last_step_loss
        self.restore_figures(self._figures_before)


class _StepBeginCallback(TrainerCallback):
    """Tells the trainer that a step begins."""

    def __init__(self, trainer: OptimizationMixin):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.begin_step()
