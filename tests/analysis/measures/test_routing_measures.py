"""What all measures of routing have in common."""

import json
import math
from dataclasses import asdict

import pytest
from routed import measured, part, random_tokens, subject

from upcycled_moe.analysis.measures.co_activation import CoActivation
from upcycled_moe.analysis.measures.committee import StandingCommittee
from upcycled_moe.analysis.measures.domains import DomainSpecialization
from upcycled_moe.analysis.measures.routing import Routing
from upcycled_moe.analysis.measures.routing_weights import RoutingWeights


BY_DOMAIN = [RoutingWeights, DomainSpecialization, StandingCommittee]
of_all = pytest.mark.parametrize("measure", [Routing, CoActivation, *BY_DOMAIN])


def _numbers(value):
    """All numbers in nested lists and dicts; None as NaN."""
    if isinstance(value, dict | list):
        return [each for inner in (value.values() if isinstance(value, dict) else value) for each in _numbers(inner)]
    return [math.nan if value is None else value]


@of_all
@pytest.mark.parametrize("num_top", [1, 3])
def test_batches_do_not_matter(measure, num_top):
    domains = [random_tokens(domain, 40, 6, num_top, domain) for domain in range(3)]
    parts = [part(tokens, *ends) for ends in ((33, None), (0, 1), (1, 33)) for tokens in reversed(domains)]

    whole = measured(measure, subject(3, 6, num_top), *domains)
    in_parts = measured(measure, subject(3, 6, num_top), *parts)

    assert _numbers(in_parts.per_layer) == pytest.approx(_numbers(whole.per_layer), nan_ok=True)
    assert _numbers(in_parts.tables) == pytest.approx(_numbers(whole.tables), nan_ok=True)


@of_all
@pytest.mark.parametrize("num_domains", [1, 2, 4])
@pytest.mark.parametrize("num_top", [1, 2])
def test_every_figure_is_in_a_result_that_json_can_hold(measure, num_domains, num_top):
    """The second layer and the last domain have no tokens."""
    batches = [random_tokens(domain, 20, 5, num_top, domain, unused=2) for domain in range(max(num_domains - 1, 1))]

    result = measured(measure, subject(num_domains, 5, num_top, num_layers=2), *batches)

    assert list(result.per_layer) == [figure.name for figure in measure.figures]
    assert all(len(values) == 2 for values in [*result.per_layer.values(), *result.tables.values()])
    json.dumps(asdict(result), allow_nan=False)


@of_all
def test_a_domain_without_tokens_counts_nowhere(measure):
    batches = [random_tokens(domain, 20, 5, 2, domain) for domain in range(2)]

    without = measured(measure, subject(2, 5), *batches)
    with_empty = measured(measure, subject(3, 5), *batches)

    assert with_empty.per_layer == without.per_layer


@pytest.mark.parametrize("measure", BY_DOMAIN)
def test_domains_count_equally(measure):
    """Repeating the tokens of a domain changes nothing but what chance gives."""
    first, second = (random_tokens(domain, 20, 5, 2, domain) for domain in range(2))

    once = measured(measure, subject(2, 5), first, second)
    repeated = measured(measure, subject(2, 5), first, second, second, second)

    for result in (once, repeated):
        result.per_layer.pop("domain_divergence_by_load", None)
    assert _numbers(repeated.per_layer) == pytest.approx(_numbers(once.per_layer), nan_ok=True)
