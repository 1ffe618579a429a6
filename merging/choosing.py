"""The coefficients that a method gives, and what it takes for granted."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.moe_source import MoeSource
from ..common.progress import Progress
from ..common.settings import SettingsError
from .coefficients import MergeCoefficients, average_coefficients, load_coefficients, shared_coefficients
from .layout import ExpertLayout
from .settings import MergeSettings


if TYPE_CHECKING:
    from ..preference.fit_record import FitRecord


@dataclass(frozen=True)
class Choice:
    """Coefficients, and what they come from.

    Args:
        num_tokens: of the text that they were measured on, by domain; None without.
        fit: how they were learned; None if they were not.
    """

    coefficients: MergeCoefficients
    num_tokens: dict[str, int] | None = None
    fit: "FitRecord | None" = None


def check_method(source: MoeSource, layout: ExpertLayout, settings: MergeSettings) -> None:
    """Check, before anything is read, that `source` can be merged by the method.

    Raises:
        SettingsError: if it lacks what the method is about.
    """
    if settings.method == "shared" and not layout.has_shared_expert:
        raise SettingsError(f"{source.name}: has no shared expert; choose another method.")
    if settings.learn is not None:
        # Imported here, like what reads text below: it takes seconds, and the other methods have no use for it.
        from .learning import check_learning

        check_learning(source, layout, settings.learn)


def choose(
    source: MoeSource, layout: ExpertLayout, settings: MergeSettings, learn: bool, progress: Progress
) -> Choice:
    """Return the coefficients that the method gives.

    Args:
        learn: whether `learned` learns; if not, its coefficients are those that it would start from.

    Raises:
        SettingsError: if a file or data does not fit the model.
    """
    if settings.method == "usage":
        from .usage import measure_coefficients

        return Choice(*measure_coefficients(source, layout, settings.text, progress))
    if settings.method == "learned":
        from .learning import initial_coefficients, learn_coefficients
        from .lessons import read_lesson

        lesson = read_lesson(source, settings.learn)
        initial = initial_coefficients(source, layout, settings.learn, lesson, progress)
        if not learn:
            return Choice(initial)
        coefficients, fit = learn_coefficients(source, layout, settings.learn, lesson, initial, progress)
        return Choice(coefficients, fit=fit)
    if settings.method == "coefficients":
        path = settings.coefficients
        loaded = load_coefficients(path, layout.moe_layers, layout.num_experts, layout.has_shared_expert)
        _check_slices(path, layout, loaded)
        return Choice(loaded)
    return Choice((average_coefficients if settings.method == "average" else shared_coefficients)(layout))


def warn_of_average(
    source: MoeSource, layout: ExpertLayout, coefficients: MergeCoefficients, progress: Progress
) -> None:
    """Warn of experts that an average by `coefficients` leaves out, or for which it means little."""
    if not _averages(layout, coefficients):
        return
    num_free = source.config.num_routed_experts - source.config.num_experts
    if num_free:
        progress.warn(
            f"{source.name}: its {num_free} experts without computation have no place in a dense FFN and are left out."
        )
    if layout.is_from_scratch:
        progress.warn(
            f"{source.name}: its experts started at random, so their neurons do not correspond and their average "
            "means little; `shared` or one expert alone (coefficients) keeps what was learned."
        )


def _check_slices(path: Path, layout: ExpertLayout, coefficients: MergeCoefficients) -> None:
    """Check that every slice of the FFN has an expert that counts."""
    for layer_idx, matrices in coefficients.layers.items():
        for matrix, values in matrices.items():
            for number in range(layout.num_slices):
                experts = layout.slice_of(number)
                if not any(values[expert] for expert in experts):
                    raise SettingsError(
                        f"{path}: layer {layer_idx}, {matrix}: experts {experts[0]} to {experts[-1]} are all "
                        "copies of one slice of the FFN, and all zero; let one count."
                    )


def _averages(layout: ExpertLayout, coefficients: MergeCoefficients) -> bool:
    """Return whether more than one copy of an FFN, or of a slice of it, counts anywhere, but for shared experts."""
    return any(
        sum(values[expert] > 0 for expert in layout.slice_of(number)) > 1
        for layer_idx, matrices in coefficients.layers.items()
        if coefficients.shared is None or coefficients.shared[layer_idx] < 1
        for values in matrices.values()
        for number in range(layout.num_slices)
    )
