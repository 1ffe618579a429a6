"""Routed tokens for tests of measures, and what a measure finds in them.

Dimensions: T tokens, E experts, K slots of a token.
"""

from types import SimpleNamespace

import torch

from upcycled_moe.analysis.measures import Measure, Subject
from upcycled_moe.analysis.results import MeasureResult
from upcycled_moe.common.moe_layers import RoutedTokens


def subject(num_domains: int, num_experts: int, num_top: int = 2, num_layers: int = 1) -> Subject:
    """Return a subject whose layers know no more than their numbers of experts."""
    layer = SimpleNamespace(num_experts=num_experts, num_experts_per_tok=num_top)
    return Subject([layer] * num_layers, [f"domain{domain}" for domain in range(num_domains)], torch.device("cpu"))


def routed(
    domain: int, selected: list[list[int]], weights: list[list[float]], router_logits: torch.Tensor
) -> RoutedTokens:
    """Return tokens with these experts [T][K], weights [T][K] and logits [T, E]; hidden states have no meaning."""
    positions = torch.arange(len(selected))[None]
    return RoutedTokens(
        domain=domain,
        input_ids=positions,
        position_ids=positions,
        hidden_states=torch.zeros(len(selected), 1),
        router_logits=router_logits,
        log_probabilities=router_logits.log_softmax(dim=-1),
        weights=torch.tensor(weights),
        selected=torch.tensor(selected),
    )


def random_tokens(domain: int, num_tokens: int, num_experts: int, num_top: int, seed: int, unused: int = 0):
    """Return random tokens: some slots are empty, and the last `unused` experts are never selected."""
    generator = torch.Generator().manual_seed(seed)
    # Uneven, so that loads differ between experts and domains.
    logits = torch.randn(num_tokens, num_experts, generator=generator) + torch.randn(num_experts, generator=generator)
    weights, selected = logits[:, : num_experts - unused].softmax(dim=-1).topk(num_top)
    is_empty = torch.rand(num_tokens, num_top, generator=generator) < 0.2
    weights, selected = weights.masked_fill(is_empty, 0.0), selected.masked_fill(is_empty, num_experts)
    return routed(domain, selected.tolist(), weights.tolist(), logits)


def part(tokens: RoutedTokens, begin: int, end: int | None) -> RoutedTokens:
    """Return the tokens from `begin` to `end`."""
    flat = {name: getattr(tokens, name)[begin:end] for name in ("hidden_states", "router_logits", "log_probabilities")}
    flat |= {name: getattr(tokens, name)[begin:end] for name in ("weights", "selected")}
    ids = {name: getattr(tokens, name)[:, begin:end] for name in ("input_ids", "position_ids")}
    return RoutedTokens(domain=tokens.domain, **flat, **ids)


def measured(measure: type[Measure], subject: Subject, *batches: RoutedTokens, number: int = 0) -> MeasureResult:
    """Return what `measure` finds in `batches`, all of layer `number`."""
    instance = measure(subject)
    for batch in batches:
        instance.update(number, batch)
    return instance.result()
