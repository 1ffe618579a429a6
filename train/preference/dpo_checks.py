"""What the settings of iterative DPO have to satisfy."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ...common.settings import SettingsError


if TYPE_CHECKING:
    from .dpo_arguments import IterativeDPOArguments


def _has_loss(run: "IterativeDPOArguments", *names: str) -> bool:
    # A list, once trl has settled it.
    return not set(names).isdisjoint(run.training.loss_type)


class Need(NamedTuple):
    """Settings that have an effect only with others.

    Args:
        settings: their names.
        is_met: whether they have one.
        others: what has to be set.
    """

    settings: tuple[str, ...]
    is_met: Callable[["IterativeDPOArguments"], bool]
    others: str


NEEDS = (
    Need(("ema_decay",), lambda run: run.rounds.reference == "ema", "reference=ema"),
    Need(
        ("merge_per", "merge_learning_rate", "merge_max_steps", "merge_batch_size"),
        lambda run: run.rounds.reference == "learned",
        "reference=learned",
    ),
    Need(
        ("samples_per_prompt", "temperature"),
        lambda run: run.rounds.round_data == "on_policy",
        "round_data=on_policy",
    ),
    Need(
        ("max_new_tokens", "sampling_batch_size"),
        lambda run: run.rounds.round_data == "on_policy" or run.sampling.eval_samples > 0,
        "round_data=on_policy or eval_samples",
    ),
    Need(("eval_reward_model",), lambda run: run.sampling.eval_samples > 0, "eval_samples"),
    Need(("merge_share",), lambda run: not run.merge.merge_data, "no merge_data"),
    Need(
        ("label_smoothing",),
        lambda run: _has_loss(run, "aot", "aot_unpaired", "exo_pair", "robust"),
        "loss_type=robust, exo_pair, aot or aot_unpaired",
    ),
    Need(("discopop_tau",), lambda run: _has_loss(run, "discopop"), "loss_type=discopop"),
    Need(
        ("f_alpha_divergence_coef",),
        lambda run: run.training.f_divergence_type == "alpha_divergence",
        "f_divergence_type=alpha_divergence",
    ),
    Need(("num_train_epochs",), lambda run: run.training.max_steps < 1, "no max_steps"),
)


def check_arguments(arguments: "IterativeDPOArguments") -> None:
    """Check settings that are numbers of something, and those that need each other.

    Raises:
        SettingsError: at the first that is out of range, missing or without effect.
    """
    _, rounds, pairs, merge, sampling, training, given = arguments
    _check_least(rounds, num_rounds=1)
    _check_least(pairs, max_train_pairs=1, max_eval_pairs=1)
    _check_least(merge, merge_max_steps=1, merge_batch_size=1)
    _check_least(sampling, samples_per_prompt=2, max_new_tokens=1, sampling_batch_size=1, eval_samples=0)
    _check_least(training, max_length=2, per_device_train_batch_size=1, per_device_eval_batch_size=1)
    for name, share in {"ema_decay": rounds.ema_decay, "merge_share": merge.merge_share}.items():
        if not 0 <= share < 1:
            raise SettingsError(f"{name}={share:g} is outside [0, 1).")
    if not 0 <= pairs.flip_rate <= 1:
        raise SettingsError(f"flip_rate={pairs.flip_rate:g} is outside [0, 1].")
    if sampling.temperature <= 0:
        raise SettingsError(f"temperature={sampling.temperature:g} must be above zero.")
    if training.beta <= 0:
        raise SettingsError(f"beta={training.beta:g} must be above zero.")
    for name, others in without_effect(arguments).items():
        # Nothing, or zero, asks for nothing.
        if given.get(name):
            raise SettingsError(f"{name}={given[name]} has an effect only with {others}; leave it out.")
    if (rounds.round_data == "on_policy") != (sampling.reward_model is not None):
        raise SettingsError(
            "round_data=on_policy and reward_model, which labels the policy's answers, go together; give both or "
            "neither."
        )
    draws = rounds.round_data == "on_policy" or sampling.eval_samples
    if draws and sampling.max_new_tokens >= training.max_length:
        raise SettingsError(
            f"max_new_tokens={sampling.max_new_tokens} leaves no room for prompts in "
            f"max_length={training.max_length}; lower it, or raise max_length."
        )
    if rounds.reference == "learned" and not merge.merge_data and not merge.merge_share:
        raise SettingsError("reference=learned needs pairs to learn from; give merge_data, or a merge_share above 0.")


def without_effect(arguments: "IterativeDPOArguments") -> dict[str, str]:
    """Return the settings that would do nothing in this run, each with what it needs."""
    return {name: need.others for need in NEEDS if not need.is_met(arguments) for name in need.settings}


def _check_least(group: Any, **least: int) -> None:
    for name, value in least.items():
        if (given := getattr(group, name)) is not None and given < value:
            raise SettingsError(f"{name}={given} must be at least {value}.")
