"""What `prune` is asked for. Imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..common.settings import SettingsError
from ..common.text_settings import TextSettings


# By what experts are kept, as `--help` says it.
METHODS = {
    "reap": "mean norm of what an expert adds to the tokens that are sent to it (REAP)",
    "frequency": "how often it is selected",
    "easy_ep": "what it adds to all tokens, most where the experts change a token most (EASY-EP)",
    "merge": "the most frequent ones, into which the others are merged (M-SMoE)",
}
# Scores come from text that the model may have seen, the loss from text that it has not.
EVALUATION_SPLIT = "validation"


@dataclass(frozen=True)
class PruneSettings:
    """How many experts are kept, by what, and the text that decides and the text that it is judged by.

    Args:
        method: one of `METHODS`.
        num_experts: experts with computation that every MoE layer keeps.
        calibration: text that the scores come from, and how the model runs over all text.
        max_shard_bytes: largest file to write; one is larger only if a tensor is.
        num_experts_per_tok: of the new model; by default as before.
        evaluation_data: text that the loss is measured on; by default the sources of the calibration text.
        evaluation_split: of folders and Hub datasets in it.

    Raises:
        SettingsError: if the method is unknown or a number is below 1.
    """

    method: str
    num_experts: int
    calibration: TextSettings
    max_shard_bytes: int
    num_experts_per_tok: int | None = None
    evaluation_data: Sequence[str] = ()
    evaluation_split: str = EVALUATION_SPLIT

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"method={self.method!r}: choose one of {', '.join(METHODS)}.")
        for name in ("num_experts", "num_experts_per_tok"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name}={value} must be at least 1.")

    @property
    def evaluation(self) -> TextSettings:
        """The text that the loss is measured on."""
        data = self.evaluation_data or self.calibration.data
        return replace(self.calibration, data=data, split=self.evaluation_split)
