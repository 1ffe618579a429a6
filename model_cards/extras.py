"""What a person adds to what the folder of a checkpoint says."""

from collections.abc import Sequence
from dataclasses import dataclass

from .analysis import Analysis
from .evaluation import Evaluation


@dataclass(frozen=True)
class CardExtras:
    """Beside a checkpoint, what its card is filled from.

    Args:
        title: of the card, and the model's name in its results.
        license, license_name, license_link, language, datasets: for the metadata, in the place of what follows from
            the parents and the texts.
        packaged_recipe: that makes such a model; for a card of what is not made yet.
        evaluations: scores to show.
        analysis: figures on the routing to show.
    """

    title: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: Sequence[str] = ()
    datasets: Sequence[str] = ()
    packaged_recipe: str | None = None
    evaluations: Sequence[Evaluation] = ()
    analysis: Analysis | None = None
