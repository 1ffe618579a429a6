"""Router losses in trl's trainers: those that the model itself would add, without padding, and no other."""

import pytest
import torch
from torch.nn.functional import logsigmoid
from training_runs import SHAPE
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from modeling_upcycled_moe import (
    UpcycledQwenMoeConfig,
    UpcycledQwenMoeForCausalLM,
    UpcycledQwenMoeForSequenceClassification,
)
from upcycled_moe.train.preference.router_losses import RouterLossMixin


COEFFICIENTS = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.02}
PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 3], "rejected_ids": [10, 3]},
    {"prompt_ids": [11], "chosen_ids": [12, 3], "rejected_ids": [13, 14, 15, 16, 3]},
]


class RewardTrainerWithRouters(RouterLossMixin, RewardTrainer):
    pass


class DPOTrainerWithRouters(RouterLossMixin, DPOTrainer):
    pass


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """`make_trainer("reward", **config)`: a trainer of a model with experts in training mode, and a padded batch.

    One of its experts computes nothing; it is chosen among the others, and not in `num_experts`.
    """

    def make(kind, set_up=True, gradient_checkpointing=False, **config):
        torch.manual_seed(0)
        fields = {
            **SHAPE,
            "num_experts": 4,
            "num_zero_experts": 1,
            "router_type": "linear",
            **COEFFICIENTS,
            "pad_token_id": 0,
            **config,
        }
        classes = {"reward": UpcycledQwenMoeForSequenceClassification, "dpo": UpcycledQwenMoeForCausalLM}
        labels = {"num_labels": 1} if kind == "reward" else {}
        model = classes[kind](UpcycledQwenMoeConfig(**fields, **labels))
        settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
        settings |= {"gradient_checkpointing": gradient_checkpointing, "per_device_train_batch_size": 2}
        settings |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        if kind == "reward":
            args, trainer_class = RewardConfig(**settings), RewardTrainerWithRouters
            rows = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in PAIRS]
        else:
            args = DPOConfig(**settings, precompute_ref_log_probs=True)
            trainer_class = DPOTrainerWithRouters
            rows = [{**row, "ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0} for row in PAIRS]
        trainer = _ready(trainer_class, rows, model=model, args=args, processing_class=tokenizer)
        if set_up:
            trainer.set_up_router_losses()
        else:
            trainer.moe_layers = []
        return trainer, trainer.data_collator(rows)

    return make


def _ready(trainer_class, rows, **arguments):
    from datasets import Dataset

    class Ready(trainer_class):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            return dataset

    trainer = Ready(train_dataset=Dataset.from_list(rows), **arguments)
    trainer.model.train()
    return trainer


def expected_router_loss(model, batch):
    """What the model adds to a loss of its own."""
    with torch.no_grad():
        outputs = model.base_model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_router_logits=True,
            output_selected_experts=True,
        )
        losses = model._router_losses(outputs, batch["attention_mask"])
    return (0.3 * losses["aux_loss"] + 0.02 * losses["z_loss"]).item()


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_the_losses_are_added_with_their_coefficients_and_reach_the_routers(kind, make_trainer):
    trainer, batch = make_trainer(kind)
    without, _ = make_trainer(kind, set_up=False, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    assert (batch["attention_mask"] == 0).any()

    loss = trainer.compute_loss(trainer.model, dict(batch))
    preference = without.compute_loss(without.model, dict(batch))
    added = expected_router_loss(trainer.model, batch)
    assert added > 0.3
    assert (loss - preference).item() == pytest.approx(added, abs=1e-5)
    for name, value in (("with", loss), ("without", preference)):
        value.backward()
        gradients = [
            parameter.grad.norm().item()
            for parameter_name, parameter in (trainer if name == "with" else without).model.named_parameters()
            if "gate.weight" in parameter_name
        ]
        assert len(gradients) == 2
        assert all(gradient > 0 for gradient in gradients)
    gates = [trainer.model.model.layers[0].mlp.gate.weight.grad, without.model.model.layers[0].mlp.gate.weight.grad]
    assert not torch.allclose(*gates)


def test_the_preference_loss_is_bradley_and_terrys(make_trainer):
    trainer, batch = make_trainer("reward")
    with torch.no_grad():
        chosen, rejected = trainer.model(**batch).logits[:, 0].chunk(2)
    expected = -logsigmoid(chosen - rejected).mean().item() + expected_router_loss(trainer.model, batch)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_more_padding_changes_nothing(kind, make_trainer):
    trainer, batch = make_trainer(kind)
    wider = {
        name: torch.nn.functional.pad(values, (0, 7)) if values.ndim == 2 else values for name, values in batch.items()
    }
    losses = [trainer.compute_loss(trainer.model, dict(inputs)).item() for inputs in (batch, wider)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_checkpointed_activations_give_the_same_gradients(kind, make_trainer):
    gradients = []
    for is_checkpointed in (False, True):
        trainer, batch = make_trainer(kind, gradient_checkpointing=is_checkpointed)
        if is_checkpointed:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        gradients.append({name: parameter.grad for name, parameter in trainer.model.named_parameters()})
    assert trainer.model.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_nothing_is_added_in_evaluation_and_the_configuration_stays(make_trainer):
    trainer, batch = make_trainer("dpo", output_router_logits=True)
    before = trainer.compute_loss(trainer.model, dict(batch)).item()
    assert trainer.model.config.output_router_logits is True
    trainer.model.eval()
    trainer.model.config.output_router_logits = False
    evaluated = trainer.compute_loss(trainer.model, dict(batch)).item()
    assert before - evaluated == pytest.approx(expected_router_loss(trainer.model, batch), abs=1e-5)
