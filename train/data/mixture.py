"""Domains that share the tokens by weight."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ...common.packing import TokenSource
from ...common.settings import SettingsError, check_keys
from ...common.text import TextSource, TextStream


class TokenMixture:
    """A [`TokenSource`] of several others, each a domain, of which each gets its share of the tokens.

    The next document always comes from the domain that lags furthest behind its share of all tokens so far, so no
    domain is ever ahead of its share by more than one document, and no random numbers are needed.

    Args:
        sources: The domains, each without end: one that is read through starts over by itself.
        weights: The weight of each domain, above 0.
    """

    def __init__(self, sources: Mapping[str, TokenSource], weights: Mapping[str, float]):
        self.sources = dict(sources)
        self.weights = {name: weights[name] for name in self.sources}
        self._sum_of_weights = sum(self.weights.values())
        self._state = self._beginning = {
            "num_tokens": dict.fromkeys(self.sources, 0),
            "domains": dict.fromkeys(self.sources),
        }

    def describe(self) -> dict[str, Any]:
        described = {name: source.describe() for name, source in self.sources.items()}
        names = next(iter(described.values()))
        return {
            "domain_weights": self.weights,
            **{key: {name: one[key] for name, one in described.items()} for key in names},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the tokens drawn from each domain, and the position in each."""
        return self._state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._state = state or self._beginning

    def __iter__(self) -> Iterator[Sequence[int]]:
        for name, source in self.sources.items():
            source.load_state_dict(self._state["domains"][name])
        iterators = {name: iter(source) for name, source in self.sources.items()}
        while True:
            name = self._furthest_behind()
            tokens = next(iterators[name])
            num_tokens, domains = self._state["num_tokens"], self._state["domains"]
            # New ones each time: whoever was given the last ones keeps them.
            self._state = {
                "num_tokens": {**num_tokens, name: num_tokens[name] + len(tokens)},
                "domains": {**domains, name: self.sources[name].state_dict()},
            }
            yield tokens

    def _furthest_behind(self) -> str:
        num_tokens = self._state["num_tokens"]
        total = sum(num_tokens.values())
        return max(self.weights, key=lambda name: self.weights[name] * total - self._sum_of_weights * num_tokens[name])


def used_weights(weights: Mapping[str, float], domains: Collection[str]) -> dict[str, float]:
    """Return the weights above 0.

    Raises:
        SettingsError: unless each of `domains`, and nothing else, has a weight, and one of them is above 0.
    """
    check_keys(weights, sorted(domains), "domain_weights")
    if missing := sorted(set(domains) - set(weights)):
        raise SettingsError(
            f"domain_weights says nothing of {', '.join(map(repr, missing))}; give each domain of train_data a "
            "weight, 0 to leave it out."
        )
    wrong = {name: weight for name, weight in weights.items() if not (weight >= 0 and math.isfinite(weight))}
    if wrong or not any(weights.values()):
        raise SettingsError(f"domain_weights={dict(weights)}: weights are 0 or above, and one at least is above 0.")
    return {name: weight for name, weight in weights.items() if weight > 0}


class OneDomainStream(TextStream):
    """A [`TextStream`] whose documents are all of one domain, or an error."""

    def __init__(self, sources: Sequence[TextSource]):
        super().__init__(sources)
        self.domain = sources[0].domain

    def __iter__(self) -> Iterator[dict[str, str]]:
        for document in super().__iter__():
            if document["domain"] != self.domain:
                names = ", ".join(source.name for source in self.sources if source.has_domain_column)
                raise SettingsError(
                    f"{names}: there are documents of {self.domain!r} and of {document['domain']!r}; to weigh the "
                    "domains within a file set streaming=false, or else give each domain files of its own."
                )
            yield document


def streams_by_domain(documents: TextStream) -> dict[str, OneDomainStream]:
    """Return the sources of each domain, by the domain of their first documents, as a stream of their own."""
    sources: dict[str, list[TextSource]] = {}
    for source in documents.sources:
        sources.setdefault(source.domain, []).append(source)
    return {domain: OneDomainStream(sources[domain]) for domain in sorted(sources)}
