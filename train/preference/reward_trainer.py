"""trl's RewardTrainer for upcycled models."""

from contextlib import contextmanager

from datasets import Dataset
from trl import RewardTrainer

from ...preference.scoring import batches_by_length, score_batch
from ..balancing import BalancingMixin
from ..saving.mixin import SavingMixin
from .log_probabilities import over_processes
from .pair_metrics import metrics_by_source
from .routing_figures import RoutingFiguresMixin


class RewardModelTrainer(SavingMixin, BalancingMixin, RoutingFiguresMixin, RewardTrainer):
    """[`trl.RewardTrainer`] for reward models with experts, and for dense ones, which have no router figures.

    The loss is Bradley and Terry's and the routers'. Checkpoints are there whole or not at all, and a run goes on from
    them with all weights. An evaluation is of whole pairs, by source, against the rule that the longer answer wins.

    Args:
        train_dataset: rows of `preference/template.py: tokenize_pairs`.
        eval_dataset: the same.
    """

    # No step is left out here.
    num_skipped_in_a_row = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.set_up_saving()
        self.set_up_routing_figures()
        self.set_up_balancing()
        # The step of the last evaluation, and what it returned.
        self._last_evaluation: tuple[int, dict[str, float]] = (-1, {})

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        # It is tokenized, without pairs that are too long.
        return dataset

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return accuracy, margin, loss, length baseline and number of pairs, of all and of each source."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        sequences = [*rows["chosen_ids"], *rows["rejected_ids"]]
        batches = batches_by_length(sequences, self.args.per_device_eval_batch_size)
        with self.compute_loss_context_manager():
            scores = over_processes(lambda batch: score_batch(model, [sequences[index] for index in batch]), batches)
        by_index = {
            index: score
            for batch, of_batch in zip(batches, scores, strict=True)
            for index, score in zip(batch, of_batch, strict=True)
        }
        in_order = [by_index[index] for index in range(len(sequences))]
        by_source = metrics_by_source(
            in_order[: len(rows)],
            in_order[len(rows) :],
            rows["chosen_length"],
            rows["rejected_length"],
            rows["source"],
        )
        metrics = {
            f"{metric_key_prefix}{f'_source/{source}' * bool(source)}_{name}": value
            for source, values in by_source.items()
            for name, value in values.items()
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._last_evaluation = self.state.global_step, metrics
        return metrics

    def evaluate_at_end(self) -> dict[str, float]:
        """Return what `evaluate` returns for the trained model, and repeat nothing that its last step ended with."""
        step, metrics = self._last_evaluation
        # The best model may be that of another step.
        if step == self.state.global_step and not self.args.load_best_model_at_end:
            return metrics
        return self.evaluate()

    @contextmanager
    def not_timed(self):
        """Do nothing: speed is not measured here."""
        yield

    def create_model_card(self, *args, **kwargs) -> None:
        """Write no card of trl's: the model gets one that tells where it comes from."""
