"""Learning coefficients: a model is fit to data, and nothing of it moves but what its sources count."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers
from transformers import PreTrainedModel

from ..common.checkpoints import load_config, load_model
from ..common.devices import best_device, free_memory
from ..common.learned_merge.merge import BlendGroup, LearnedMerge
from ..common.moe_source import MoeSource
from ..common.progress import Progress
from ..common.settings import SettingsError
from ..preference.fitting import FitRecord, fit_coefficients
from .coefficients import MergeCoefficients, average_coefficients
from .config import dense_config
from .layout import ExpertLayout
from .learned_ffns import LearnedFfns
from .lessons import Lesson, check_loss
from .settings import EXPERT_PARTS, SHARED_EXPERT_WEIGHT, LearnSettings
from .tensors import dense_tensors
from .usage import coefficients_by_usage


def check_learning(source: MoeSource, layout: ExpertLayout, settings: LearnSettings) -> None:
    """Check, before anything is read, that coefficients of `source` can be learned as `settings` say.

    Raises:
        SettingsError: if the loss is not for the model, or there is nothing to learn.
    """
    check_loss(source, settings)
    if settings.per not in EXPERT_PARTS:
        raise SettingsError(f"per={settings.per!r}: choose one of {', '.join(EXPERT_PARTS)} for experts.")
    if layout.num_copies == 1:
        raise SettingsError(
            f"{source.name}: has one copy of each slice of an FFN, so no coefficients to learn; choose another method."
        )
    if settings.shared_expert_weight is not None and not layout.has_shared_expert:
        raise SettingsError(
            f"{source.name}: has no shared expert for shared_expert_weight={settings.shared_expert_weight}; leave it "
            "out."
        )


def initial_coefficients(
    source: MoeSource, layout: ExpertLayout, settings: LearnSettings, lesson: Lesson, progress: Progress
) -> MergeCoefficients:
    """Return the coefficients to start from, with λ as it stays.

    Raises:
        SettingsError: if the routers do not use their experts on the data.
    """
    initial = average_coefficients(layout)
    if settings.initial == "usage":
        batch_size, dtype = settings.routing_batch_size, settings.routing_dtype
        initial = coefficients_by_usage(source, layout, lesson.blocks, batch_size, dtype, progress)
        free_memory()
    if not layout.has_shared_expert:
        return initial
    weight = settings.shared_expert_weight
    weight = SHARED_EXPERT_WEIGHT if weight is None else weight
    return replace(initial, shared=dict.fromkeys(layout.moe_layers, weight))


def learn_coefficients(
    source: MoeSource,
    layout: ExpertLayout,
    settings: LearnSettings,
    lesson: Lesson,
    initial: MergeCoefficients,
    progress: Progress,
) -> tuple[MergeCoefficients, FitRecord]:
    """Return coefficients that bring the loss down from where it is at `initial`, and how that went.

    In memory are the dense model in float32 and gradients of its FFNs; experts are read from their files.

    Raises:
        SettingsError: if the loss cannot be computed.
    """
    model = dense_model(source, layout)
    ffns = LearnedFfns(source, layout, initial, settings.per)
    record = fit(model, ffns.groups, settings, lesson, progress)
    return ffns.coefficients(), record


def fit(
    model: PreTrainedModel,
    groups: Sequence[BlendGroup],
    settings: LearnSettings,
    lesson: Lesson,
    progress: Progress,
) -> FitRecord:
    """Bring the loss of `model`, whose weights the groups make, down by their coefficients; return how that went.

    Raises:
        SettingsError: if the reference cannot be loaded, or the loss cannot be computed.
    """
    reference = None
    if settings.reference is not None:
        config = load_config(settings.reference, own_code=False)
        reference = load_model(settings.reference, config, dtype=torch.float32, device=best_device(), own_code=False)
    return fit_coefficients(
        LearnedMerge(model, groups),
        model,
        lesson.tokenizer,
        lesson.data,
        settings.fit,
        reference=reference,
        progress=progress,
    )


def dense_model(source: MoeSource, layout: ExpertLayout) -> PreTrainedModel:
    """Return the dense model that `source` is merged into, in float32 on the best device; merged FFNs are zero."""
    config = dense_config(source.config, layout.width)
    weights = {
        planned.name: source.tensors[planned.name].load()
        if planned.name in source.tensors
        else torch.zeros(planned.shape)
        for planned in dense_tensors(source, layout, average_coefficients(layout))
    }
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    return model.to(best_device())
