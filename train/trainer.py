"""The Trainer of upcycled models, put together from its parts."""

from transformers import Trainer

from ..common.blocks import collate_blocks
from .balancing import BalancingMixin
from .engines import EnginesMixin
from .evaluation import EvaluationMixin
from .monitoring.mixin import MonitoringMixin
from .optimization import OptimizationMixin
from .saving.mixin import SavingMixin
from .saving.pushing import PushingMixin


class UpcyclingTrainer(
    OptimizationMixin,
    SavingMixin,
    PushingMixin,
    BalancingMixin,
    MonitoringMixin,
    EvaluationMixin,
    EnginesMixin,
    Trainer,
):
    """[`Trainer`] for upcycled MoE checkpoints, and for dense ones, which have no router figures.

    Each part does one thing and says in its own file what: `optimization.py`, `saving/mixin.py`,
    `saving/pushing.py`, `balancing.py`, `monitoring/mixin.py`, `evaluation.py` and `engines.py`.

    Args:
        args: [`UpcyclingTrainingArguments`].
        data_collator: by default the one of packed blocks, which are all of one length.
    """

    def __init__(self, model=None, args=None, data_collator=None, *others, **kwargs):
        super().__init__(model, args, data_collator or collate_blocks, *others, **kwargs)
        # Dense models have no MoE layers. The class is not asked for: remote code would be another one.
        self.moe_layers = list(getattr(self.model.config, "moe_layers", []))
        self.set_up_saving()
        self.set_up_optimization()
        self.set_up_monitoring()
        self.set_up_balancing()
