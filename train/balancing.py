"""Balance of the experts beyond the losses: biases that follow the loads, and which node an expert is on."""

import os

from transformers import TrainerCallback

from ..common.settings import SettingsError


class BalancingMixin:
    """Moves the biases of routers with `use_router_bias` after each step, by the loads of all its tokens."""

    def set_up_balancing(self) -> None:
        """Prepare the model and the run for it; after the set-up of monitoring.

        Raises:
            SettingsError: if the run cannot keep the biases, or has other nodes than `expert_nodes` names.
        """
        self.node = 0
        self._set_node()
        if self.moe_layers and self.model.config.use_router_bias:
            self._check_biases_can_be_sharded()
            self.add_callback(_RouterBiasCallback(self))

    def _set_node(self) -> None:
        """Tell the model which node it is on, for the locality loss.

        Raises:
            SettingsError: if the run has other nodes than `expert_nodes` names.
        """
        if "locality_loss" not in self.loss_names:
            return
        # `torchrun` and `accelerate launch` number the nodes so; a single process is on the first.
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        if self.args.world_size > 1 and "GROUP_WORLD_SIZE" not in os.environ:
            raise SettingsError(
                "router_locality_loss_coef needs to know the node of each process, which the launcher does not tell "
                "(GROUP_RANK, GROUP_WORLD_SIZE); start with torchrun or accelerate launch."
            )
        num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        if set(self.model.config.expert_nodes) != set(range(num_nodes)):
            raise SettingsError(
                f"expert_nodes={self.model.config.expert_nodes} must name the nodes of this run, 0 to "
                f"{num_nodes - 1}; give it for them, or router_locality_loss_coef=0."
            )
        for module in self.model.modules():
            # Also under adapters, and not by its class: remote code has another one.
            if hasattr(type(module), "expert_node"):
                module.expert_node = self.node

    def _check_biases_can_be_sharded(self) -> None:
        if self.is_deepspeed_enabled and self.accelerator.mixed_precision != "no":
            raise SettingsError(
                "use_router_bias=True: with mixed precision DeepSpeed converts the routers' biases too, where small "
                "steps get lost; train with FSDP2, or with mixed_precision: 'no' and no bf16."
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 1:
            raise SettingsError(
                "use_router_bias=True: FSDP version 1 would convert the routers' biases to the type of the "
                "computation, where small steps get lost; set fsdp_version to 2 in the accelerate configuration."
            )

    def update_router_biases(self) -> None:
        """Move the selection biases by the loads of the step that has just ended, over all processes."""
        loads = self.take_step_loads()
        # A step that was skipped moves nothing.
        if not self.step_was_skipped:
            loads = self.sum_over_batches(loads)
            self.accelerator.unwrap_model(self.model).update_router_biases(loads)


class _RouterBiasCallback(TrainerCallback):
    """Moves the routers' biases after each optimizer step."""

    def __init__(self, trainer: BalancingMixin):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.update_router_biases()
