"""The measures of an analysis, in the order of the report."""

from .co_activation import CoActivation
from .committee import StandingCommittee
from .domains import DomainSpecialization
from .expert_outputs import ExpertOutputs
from .expert_weights import ExpertWeights
from .local_consistency import LocalConsistency
from .measure import Measure, Subject
from .routing import Routing
from .routing_weights import RoutingWeights
from .vocabulary import VocabularySpecialization


MEASURES: tuple[type[Measure], ...] = (
    Routing,
    RoutingWeights,
    DomainSpecialization,
    StandingCommittee,
    CoActivation,
    ExpertOutputs,
    ExpertWeights,
    VocabularySpecialization,
    LocalConsistency,
)

__all__ = ["MEASURES", "Measure", "Subject"]
