"""Perplexity by domain."""

import torch
from transformers.trainer_utils import EvalLoopOutput

from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ..common.blocks import count_targets
from ..common.numbers import perplexity


class EvaluationMixin:
    """Evaluates the language-modeling loss alone, over all targets of each domain, and over those of all domains."""

    # The step of the last evaluation of all domains, and what it returned.
    _last_evaluation: tuple[int, dict[str, float]] = (-1, {})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The mean over this micro-batch, whatever other processes hold: sums are formed below.
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if getattr(outputs, "router_loss", None) is not None:
            loss = loss - outputs.router_loss
        self._add_eval_loss(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _add_eval_loss(self, loss: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        num_targets = count_targets(inputs)
        # Blocks that only fill up a batch have no targets, and a mean over none is not a number.
        self._eval_sums[0] += torch.where(num_targets > 0, loss * num_targets, 0.0)
        self._eval_sums[1] += num_targets

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """As in [`Trainer`], with the mean loss over all targets and its perplexity.

        Transformers' own mean is over batches, and counts an incomplete one like the others.
        """
        self._eval_sums = torch.zeros(2, device=self.args.device, dtype=sum_dtype(self.args.device))
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, num_targets = self.accelerator.reduce(self._eval_sums, reduction="sum").tolist()
        loss = loss_sum / max(num_targets, 1)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_perplexity"] = perplexity(loss)
        self._num_eval_targets = num_targets
        return output

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        with self.not_timed():
            metrics = self._evaluate_domains(eval_dataset, *args, **kwargs)
        if eval_dataset is None:
            self._last_evaluation = self.state.global_step, metrics
        return metrics

    def evaluate_at_end(self) -> dict[str, float]:
        """Return what `evaluate` returns for the trained model, and repeat nothing that its last step ended with."""
        step, metrics = self._last_evaluation
        # The best model may be that of another step.
        if step == self.state.global_step and not self.args.load_best_model_at_end:
            return metrics
        return self.evaluate()

    def _evaluate_domains(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        eval_sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(eval_sets, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics, loss_sum, num_targets = {}, 0.0, 0.0
        for domain in eval_sets:
            prefix = f"{metric_key_prefix}_{domain}"
            metrics.update(super().evaluate(eval_sets[domain], ignore_keys, prefix))
            loss_sum += metrics[f"{prefix}_loss"] * self._num_eval_targets
            num_targets += self._num_eval_targets
        loss = loss_sum / num_targets
        overall = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": perplexity(loss)}
        self.log(dict(overall))
        return {**metrics, **overall}
