"""trl's DPOConfig with this recipe's defaults."""

from dataclasses import dataclass

from trl import DPOConfig

from .dpo_arguments import DPOArguments
from .whole_models import WholeModelMixin


@dataclass
class DPOTrainingArguments(WholeModelMixin, DPOArguments, DPOConfig):
    """[`trl.DPOConfig`] for a round; the fields of [`DPOArguments`] have another default.

    Raises:
        SettingsError: for what the rounds cannot do.
    """

    def __post_init__(self):
        # The reference's log-probabilities are computed before, so that no round holds two models.
        self.precompute_ref_log_probs = True
        self.settle_gradient_checkpointing()
        super().__post_init__()
        self.check_whole("Iterative DPO")
