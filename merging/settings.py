"""What a merge can be asked for. Imports nothing heavy: the command line shows the choices."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..common.settings import SettingsError
from ..common.text_settings import TextSettings
from ..preference.settings import FitSettings, PairSettings


METHODS = ("average", "usage", "coefficients", "shared", "learned")
# Of whole checkpoints, which no router tells from each other.
CHECKPOINT_METHODS = ("average", "coefficients", "learned")
# What has coefficients of its own, of experts and of whole checkpoints, and where they start from.
EXPERT_PARTS = ("layer", "matrix")
CHECKPOINT_PARTS = ("model", "layer")
PARTS = tuple(dict.fromkeys(EXPERT_PARTS + CHECKPOINT_PARTS))
INITIAL = ("uniform", "usage")
# λ of `learned`. Source: XFT (arXiv 2404.15247), in its published code; not from UMM-RM, which tells none.
SHARED_EXPERT_WEIGHT = 0.75
# What each loss is computed on.
DATA_OF_LOSS: Mapping[str, type] = MappingProxyType(
    {"bradley_terry": PairSettings, "dpo": PairSettings, "lm": TextSettings}
)


@dataclass(frozen=True)
class LearnSettings:
    """How coefficients are learned.

    Args:
        data: preference pairs, or text for the loss `lm`.
        fit: the loss, and how it is brought down.
        per: `layer`, one set of coefficients for the weights of a layer; `matrix`, one for each matrix of experts;
            `model`, one for all weights of whole checkpoints.
        initial: `uniform`, all experts alike at first; `usage`, by what the routers weight them with on `data`.
        routing_batch_size, routing_dtype: how the model runs over the data for `usage`: blocks or conversations at a
            time, and the type that it computes in.
        shared_expert_weight: λ of all layers; by default `SHARED_EXPERT_WEIGHT` if there is a shared expert.
        reference: dense language model of the loss `dpo`, a folder or Hub id; by default the merge as it is at first.

    Raises:
        SettingsError: if a choice is unknown, λ is outside [0, 1), or the data or the reference is not for the loss.
    """

    data: PairSettings | TextSettings
    fit: FitSettings
    per: str = "layer"
    initial: str = "uniform"
    routing_batch_size: int = TextSettings.batch_size
    routing_dtype: str = TextSettings.dtype
    shared_expert_weight: float | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("per", PARTS), ("initial", INITIAL)):
            value = getattr(self, name)
            if value not in allowed:
                raise SettingsError(f"{name}={value!r}: choose one of {', '.join(allowed)}.")
        weight = self.shared_expert_weight
        if weight is not None and not 0 <= weight < 1:
            raise SettingsError(
                f"shared_expert_weight={weight} is outside [0, 1); with 1 nothing is left to learn: that is --method "
                "shared."
            )
        if not isinstance(self.data, DATA_OF_LOSS[self.fit.loss]):
            kind = "text" if self.fit.loss == "lm" else "preference pairs"
            raise SettingsError(f"loss={self.fit.loss!r} is computed on {kind}; give data of that kind.")
        if self.reference is not None and self.fit.loss != "dpo":
            raise SettingsError(
                f"--reference has no meaning with --loss {self.fit.loss}, only with dpo; leave it out."
            )


@dataclass(frozen=True)
class MergeSettings:
    """How the experts of each layer become one FFN.

    Args:
        method: `average`, all experts alike; `usage`, by what the routers weight them with on `text`; `coefficients`,
            those in a file; `shared`, the shared expert alone; `learned`, by what brings a loss down.
        coefficients: the file of `coefficients`.
        text: the text of `usage`.
        learn: the data of `learned`, and how.

    Raises:
        SettingsError: if the method lacks what it needs, or has what it has no use for.
    """

    method: str = "average"
    coefficients: Path | None = None
    text: TextSettings | None = None
    learn: LearnSettings | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"method={self.method!r}: choose one of {', '.join(METHODS)}.")
        for method, name, flag, value in (
            ("coefficients", "a file", "--coefficients", self.coefficients),
            ("usage", "text", "--data", self.text),
            ("learned", "a loss, and data for it", "--loss and --data", self.learn),
        ):
            if self.method == method and value is None:
                raise SettingsError(f"--method {method} needs {name}; give {flag}.")
            if self.method != method and value is not None:
                raise SettingsError(
                    f"{flag} has no meaning with --method {self.method}, only with {method}; leave it out."
                )
