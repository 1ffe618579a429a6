"""What a person adds to what the folder of a checkpoint says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .analysis import Analysis
from .evaluation import Evaluation


# What a person declares once, and later cards keep.
DECLARATIONS = ("title", "license", "license_name", "license_link", "language", "datasets")


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

    @property
    def declared(self) -> dict[str, Any]:
        """What a person declared, for JSON."""
        values = {name: getattr(self, name) for name in DECLARATIONS}
        return {name: value if isinstance(value, str) else list(value) for name, value in values.items() if value}

    def with_earlier(self, declared: Mapping[str, Any]) -> "CardExtras":
        """Return these with what was `declared` earlier, where nothing else is said now; a licence is one unit."""
        kept = {
            name: value
            for name, value in declared.items()
            if name in DECLARATIONS and not getattr(self, name) and not (name.startswith("license") and self.license)
        }
        return replace(self, **kept)
