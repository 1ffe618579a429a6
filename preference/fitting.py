"""Learning what the sources of a merge count: from preference pairs, or from text."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from modeling_upcycled_moe.losses_upcycled_moe import ROUTER_LOSSES

from ..common.learned_merge.merge import LearnedMerge
from ..common.progress import Progress
from ..common.settings import SettingsError
from .fit_record import LEAST_MOVE, FitRecord, FitStep
from .fit_trainers import make_trainer, same_afterwards, silent
from .settings import FitSettings
from .template import keep_padding, set_chat_template, tokenize_pairs


# What the trainers call the share of held-out pairs whose chosen answer scores higher.
_ACCURACY = {"bradley_terry": "eval_accuracy", "dpo": "eval_rewards/accuracies"}


def fit_coefficients(
    merge: LearnedMerge,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Dataset,
    settings: FitSettings,
    reference: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> FitRecord:
    """Learn the coefficients of `merge` on `data`, and return how that went; the model has the last weights then.

    Adam moves the logits of the coefficients, without weight decay. The model runs where it is and in its type,
    without losses of routers and without their noise.

    Args:
        model: the one that `merge` writes to: a reward model with one output for `bradley_terry`, else a language
            model. The padding token of its configuration says which token a reward model scores.
        tokenizer: with a chat template; None for `lm`. For `bradley_terry` it gets the model's padding token.
        data: what `read_pairs` returns, or for `lm` blocks of text of one length, as `input_ids`.
        reference: of `dpo`; by default the merge as it is now. Its log-probabilities are computed before the first
            step.
        progress: it is warned of coefficients that hardly moved, and of a loss that did not fall.

    Raises:
        SettingsError: if trl is missing, or the model, the tokenizer or the data do not fit the loss.
    Source: DPO (arXiv 2305.18290), and the Bradley-Terry loss of reward models as in InstructGPT (arXiv 2203.02155),
        equation 1. That coefficients of a merge are learned with them is UMM-RM's (arXiv 2512.00724) and TPMM-DPO's
        (arXiv 2605.23398); settings and optimizer are our reading.
    """
    progress = progress or Progress()
    _check(model, settings)
    training, heldout = split(*_prepared(data, model, tokenizer, settings, progress), settings)
    optimizer = merge.attached(torch.optim.Adam(merge.parameters(), lr=settings.learning_rate))
    initial = merge.values()
    with (
        silent(),
        same_afterwards(model, reference),
        _without_router_extras(model),
        TemporaryDirectory() as folder,
        progress.task("Learning coefficients", settings.max_steps, "steps") as advance,
    ):
        trainer = make_trainer(model, tokenizer, training, heldout, settings, optimizer, reference, Path(folder))
        observer = _Observer(merge, advance)
        trainer.add_callback(observer)
        before = _measured(trainer, settings)
        if settings.loss == "dpo" and reference is None:
            del before["accuracy"]  # of a model against itself: all margins are zero
        trainer.train()
        after = _measured(trainer, settings)
    record = FitRecord(
        settings=settings,
        num_train=len(trainer.train_dataset),
        num_heldout=len(trainer.eval_dataset),
        initial=initial,
        steps=tuple(observer.steps),
        before=before,
        after=after,
    )
    if record.largest_relative_move < LEAST_MOVE:
        progress.warn(
            f"No coefficient moved by {LEAST_MOVE:.0%} of itself (at most {record.largest_relative_move:.2%}): the "
            "merge is about what it began as; raise the learning rate or the number of steps."
        )
    elif after["loss"] >= before["loss"]:
        progress.warn(
            f"On what was held out the loss did not fall ({before['loss']:.4f} before, {after['loss']:.4f} after): "
            "the merge is no better than what it began as; give more data, or lower the learning rate."
        )
    return record


class _Observer(TrainerCallback):
    """Keeps what each step did."""

    def __init__(self, merge: LearnedMerge, advance: Callable[[int], None]):
        self.steps: list[FitStep] = []
        self._merge, self._advance = merge, advance

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        # The summary at the end, and evaluations, have no loss of this name.
        if logs and "loss" in logs:
            self.steps.append(FitStep(float(logs["loss"]), self._merge.gradient_norm(), self._merge.values()))
            self._advance(1)


def split(data: Dataset, prompts: Sequence[str] | None, settings: FitSettings) -> tuple[Dataset, Dataset]:
    """Return what is learned from, and what is held out: a share of all, at random.

    Pairs of one prompt stay together: they often share answers as well, and would not be new. Prompts with more pairs
    than are still to be held out are learned from.

    Args:
        prompts: of the rows; None for rows that are apart as they are.

    Raises:
        SettingsError: if one of them would be empty.
    """
    num_heldout = round(settings.holdout * len(data))
    if not 0 < num_heldout < len(data):
        raise SettingsError(
            f"holdout={settings.holdout} of {len(data)} pairs or blocks leaves {len(data) - num_heldout} to learn "
            f"from and {num_heldout} to measure; give more data."
        )
    groups: dict[str | int, list[int]] = {}
    for row, prompt in enumerate(range(len(data)) if prompts is None else prompts):
        groups.setdefault(prompt, []).append(row)
    if len(groups) == 1:
        raise SettingsError(
            f"All {len(data)} pairs are of one prompt, and one to measure on must be another; give pairs of more."
        )
    shuffled, kept, heldout = list(groups.values()), [], []
    for number in torch.randperm(len(groups), generator=torch.Generator().manual_seed(settings.seed)).tolist():
        rows = shuffled[number]
        (heldout if len(heldout) + len(rows) <= num_heldout else kept).extend(rows)
    if not heldout:
        heldout = min(shuffled, key=len)
        kept = sorted(set(kept).difference(heldout))
    return data.select(kept), data.select(heldout)


def _prepared(
    data: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: FitSettings,
    progress: Progress,
) -> tuple[Dataset, list[str] | None]:
    """Return `data` as the trainer takes it, without what is too long, and the prompts of pairs."""
    if settings.loss == "lm":
        return data, None
    set_chat_template(tokenizer, None, "The merge")
    if settings.loss == "dpo":
        pairs = _with_room(data, tokenizer, settings.max_length, progress)
        return pairs, _prompts(pairs)
    keep_padding(tokenizer, model.config, "The merge")
    model.get_input_embeddings().padding_idx = None  # its token may stand in a text
    tokenized = tokenize_pairs(data, tokenizer, settings.max_length, "The pairs", progress)
    return tokenized.rows, _prompts(data.select(tokenized.numbers))


def _prompts(pairs: Dataset) -> list[str]:
    return [json.dumps(prompt, sort_keys=True) for prompt in pairs["prompt"]]


def _with_room(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress) -> Dataset:
    """Return the pairs whose prompt leaves room for an answer; trl would drop the others without a word."""
    rendered = (
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        for prompt in pairs["prompt"]
    )
    kept = [number for number, tokens in enumerate(rendered) if len(tokens["input_ids"]) < max_length]
    if not kept:
        raise SettingsError(
            f"The prompts of all {len(pairs):,} pairs have max_length={max_length} tokens or more; raise it, or give "
            "shorter ones."
        )
    if len(kept) < len(pairs):
        progress.warn(
            f"{len(pairs) - len(kept):,} of {len(pairs):,} pairs have prompts of max_length={max_length} tokens or "
            "more and are left out."
        )
    return pairs.select(kept)


def _check(model: PreTrainedModel, settings: FitSettings) -> None:
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    if (settings.loss == "bradley_terry") != is_classifier or (is_classifier and model.config.num_labels != 1):
        labels = f" with num_labels={model.config.num_labels}" * is_classifier
        raise SettingsError(
            f"loss={settings.loss!r} cannot train a {type(model).__name__}{labels}; bradley_terry takes a reward "
            "model (…ForSequenceClassification with num_labels=1), lm and dpo a language model."
        )


def _measured(trainer: Trainer, settings: FitSettings) -> dict[str, float]:
    """Return the figures of all that is held out.

    The trainers' are means over batches, whatever their size: what is left over of whole ones is measured apart.
    """
    data, names = trainer.eval_dataset, {"loss": "eval_loss"}
    if settings.loss in _ACCURACY:
        names["accuracy"] = _ACCURACY[settings.loss]
    measured = dict.fromkeys(names, 0.0)
    num_whole = len(data) - len(data) % settings.batch_size
    for rows in filter(len, (range(num_whole), range(num_whole, len(data)))):
        # Not as an argument: trl would compute log-probabilities of the reference anew.
        trainer.eval_dataset = data.select(rows)
        metrics = trainer.evaluate()
        for name, metric in names.items():
            measured[name] += metrics[metric] * len(rows) / len(data)
    trainer.eval_dataset = data
    return measured


@contextmanager
def _without_router_extras(model: PreTrainedModel) -> Iterator[None]:
    """Leave losses and noise of routers out of a model with experts: the coefficients are of what it says."""
    names = (*ROUTER_LOSSES.values(), "router_jitter_noise")
    kept = {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
    try:
        for name in kept:
            setattr(model.config, name, 0.0)
        yield
    finally:
        for name, value in kept.items():
            setattr(model.config, name, value)
