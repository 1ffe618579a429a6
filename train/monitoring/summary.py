"""The line at the end of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers.trainer_utils import TrainOutput


if TYPE_CHECKING:
    from ..trainer import UpcyclingTrainer


def summary(trainer: "UpcyclingTrainer", result: TrainOutput, metrics: Mapping[str, float]) -> str:
    """Return what a run came to, in a line: steps, tokens and speed of this start, losses, skipped steps, routing.

    Args:
        result: what `trainer.train` returned.
        metrics: what `trainer.evaluate` returned; empty without evaluation.
    """
    parts = [f"{result.global_step:,} steps"]
    if trainer.num_trained_tokens:
        parts += [_speed(trainer), f"loss {result.training_loss:.4f}"]
    if "eval_perplexity" in metrics:
        parts.append(f"eval perplexity {metrics['eval_perplexity']:.3f}")
    if trainer.num_skipped_steps:
        parts.append(f"{trainer.num_skipped_steps:,} steps skipped")
    if trainer.last_layers:
        parts.append(_routing(trainer))
    return f"{trainer.args.output_dir}: {', '.join(parts)}"


def _speed(trainer: "UpcyclingTrainer") -> str:
    num_tokens, seconds = trainer.num_trained_tokens, trainer.training_seconds
    speed = trainer.speed(num_tokens, seconds)
    shown = f"{num_tokens:,.0f} tokens in {_duration(seconds)} ({speed['tokens_per_second']:,.0f} tokens/s"
    return f"{shown}, MFU {speed['mfu']:.1%})" if "mfu" in speed else f"{shown})"


def _duration(seconds: float) -> str:
    """Return `3 h 5 min`, `5 min 12 s` or `7.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _routing(trainer: "UpcyclingTrainer") -> str:
    layers = trainer.last_layers
    num_dead = sum(metrics["dead_experts"] for metrics in layers.values())
    worst = max(layers, key=lambda layer: layers[layer]["max_violation"])
    largest = 1 + layers[worst]["max_violation"]
    num_experts = sum(len(metrics["load"]) for metrics in layers.values())
    return (
        f"{num_dead:,} of {num_experts:,} experts without a token at the last log, largest load {largest:.2g} × the "
        f"balanced one in layer {worst}"
    )
