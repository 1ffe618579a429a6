"""The measures of an analysis, in the order of the report."""

from .co_activation import CoActivation
from .committee import StandingCommittee
from .domains import DomainSpecialization
from .measure import Measure, Subject
from .routing import Routing
from .routing_weights import RoutingWeights


MEASURES: tuple[type[Measure], ...] = (
    Routing,
    RoutingWeights,
    DomainSpecialization,
    StandingCommittee,
    CoActivation,
)

__all__ = ["MEASURES", "Measure", "Subject"]
