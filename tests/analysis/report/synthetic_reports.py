"""Reports with numbers out of thin air, in the shapes that the measures give."""

import random

from upcycled_moe.analysis.measures import MEASURES
from upcycled_moe.analysis.results import AnalysisReport, CheckpointResult, Comparison, MeasureResult


def make_report(
    names=("first", "second"),
    num_layers: int = 3,
    num_experts: int = 4,
    num_experts_per_tok: int = 2,
    domains=("math", "code"),
) -> AnalysisReport:
    """Return a report with every figure of every measure, and the tables that are drawn or listed."""
    generator = random.Random(0)

    def numbers(*shape):
        return [numbers(*shape[1:]) for _ in range(shape[0])] if shape else generator.random()

    num_domains = len(domains)
    by_expert, by_domain = (num_layers, num_experts), (num_layers, num_domains, num_experts)
    pairs = (num_layers, num_experts, num_experts)
    token = {"id": 7, "token": " the\n", "share": 0.9, "occurrences": 1200}
    checkpoints = []
    for name in names:
        tables = {
            "routing": {"load": numbers(*by_expert), "domain_load": numbers(*by_domain)},
            "routing_weights": {"weights": numbers(*by_domain), "probabilities": numbers(*by_domain)},
            "domains": {"specialization": numbers(*by_domain), "uniform": numbers(num_layers, num_domains)},
            "co_activation": {"co_activation": numbers(*pairs)},
            "committee": {"presence": numbers(*by_expert), "committee": [[1] + [0] * (num_experts - 1)] * num_layers},
            "expert_outputs": {"similarity": numbers(*pairs), "tokens": [64] * num_layers},
            "expert_weights": {
                "similarity": numbers(*pairs),
                "similarity_of_matrices": {"gate": numbers(num_layers)},
                "divergence": numbers(*by_expert),
                "update_similarity": [[[None] * num_experts] * num_experts] * num_layers,
            },
            "vocabulary": {"tokens": [[[token]] * num_experts] * num_layers, "coverage": numbers(num_layers)},
            "local_consistency": {
                "segment_lengths": [4, 16],
                "segments": [9, 0],
                "cache_sizes": [2],
                "srp": [[0.25, None]] * num_layers,
                "srp_by_load": numbers(num_layers, 2),
                "sch": [[[0.5], [None]]] * num_layers,
                "sch_by_load": numbers(num_layers, 2, 1),
            },
        }
        measures = {
            measure.name: MeasureResult(
                per_layer={figure.name: numbers(num_layers) for figure in measure.figures},
                tables=tables.get(measure.name, {}),
            )
            for measure in MEASURES
        }
        checkpoints.append(
            CheckpointResult(
                name=name,
                path=f"/models/{name}",
                model_type="qwen2_moe",
                num_experts=num_experts,
                num_experts_per_tok=num_experts_per_tok,
                layers=list(range(num_layers)),
                tokenizer="digest",
                num_tokens=dict.fromkeys(domains, 4096),
                measures=measures,
            )
        )
    per_layer = {"router_saturation": numbers(num_layers), "router_saturation_by_load": numbers(num_layers)}
    comparisons = [
        Comparison(first, second, per_layer) for at, first in enumerate(names) for second in names[at + 1 :]
    ]
    return AnalysisReport({"data": ["text"], "parent": None}, list(domains), checkpoints, comparisons, {"torch": "2"})
