"""Router figures against a count by hand, token for token."""

import math

import pytest
import torch

from modeling_upcycled_moe import UpcycledQwenMoeConfig
from upcycled_moe.common import routing
from upcycled_moe.common.routing import RouterStatistics, router_metrics


NUM_TOKENS, NUM_EXPERTS, TOP_K = 37, 5, 2


@pytest.fixture
def router_logits():
    return torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(0)) * 2


def _naive(router_logits, top_k, weights=None):
    """Figures of softmax routing to the `top_k` best."""
    counts, entropies, variances = [0] * router_logits.shape[1], [], []
    for token, logits in enumerate(router_logits.double().tolist()):
        if weights is not None and not weights[token]:
            continue
        total = sum(map(math.exp, logits))
        entropies.append(-sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in logits))
        mean = sum(logits) / len(logits)
        variances.append(sum((x - mean) ** 2 for x in logits) / len(logits))
        for expert in sorted(range(len(logits)), key=lambda expert: -logits[expert])[:top_k]:
            counts[expert] += 1
    load = [count / sum(counts) for count in counts]
    return {
        "load": load,
        "entropy": sum(entropies) / len(entropies),
        "load_entropy": -sum(share * math.log(share) for share in load if share),
        "max_violation": max(load) / (sum(load) / len(load)) - 1,
        "dead_experts": counts.count(0),
        "experts_per_token": sum(counts) / len(entropies),
        "logit_std": math.sqrt(sum(variances) / len(variances)),
    }


def _config(top_k=TOP_K, **fields):
    return UpcycledQwenMoeConfig(router_type="linear", num_experts=NUM_EXPERTS, num_experts_per_tok=top_k, **fields)


def _selected(router_logits, top_k=TOP_K):
    return router_logits.topk(top_k).indices


def _metrics(router_logits, top_k=TOP_K, weights=None):
    return router_metrics(router_logits, _selected(router_logits, top_k), _config(top_k), weights)


def _assert_equal(metrics, expected):
    assert metrics.keys() == expected.keys()
    for name in metrics:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-6), name


def test_metrics_equal_the_naive_count(router_logits):
    _assert_equal(_metrics(router_logits), _naive(router_logits, TOP_K))


def test_padding_does_not_count(router_logits):
    weights = (torch.arange(NUM_TOKENS) % 3 != 0).float()

    _assert_equal(_metrics(router_logits, TOP_K, weights), _naive(router_logits, TOP_K, weights))


def test_balanced_and_collapsed_routing():
    balanced = _metrics(torch.eye(4), 1)
    assert balanced["load"] == [0.25] * 4
    assert balanced["max_violation"] == pytest.approx(0)
    assert balanced["load_entropy"] == pytest.approx(math.log(4))

    collapsed = _metrics(torch.tensor([[1e4, 0.0, 0.0, 0.0]] * 3), 1)
    assert collapsed["dead_experts"] == 3
    assert collapsed["max_violation"] == pytest.approx(3)
    assert collapsed["entropy"] == pytest.approx(0)
    assert collapsed["load_entropy"] == pytest.approx(0)


def test_empty_slots_select_nobody(router_logits):
    selected = _selected(router_logits)
    selected[:7, 1] = NUM_EXPERTS

    metrics = router_metrics(router_logits, selected, _config())

    assert metrics["experts_per_token"] == pytest.approx((2 * NUM_TOKENS - 7) / NUM_TOKENS)
    assert sum(metrics["load"]) == pytest.approx(1)


def test_entropy_of_sigmoid_scores_is_that_of_their_shares(router_logits):
    metrics = router_metrics(router_logits, _selected(router_logits), _config(router_score_function="sigmoid"))

    shares = [[1 / (1 + math.exp(-x)) for x in row] for row in router_logits.tolist()]
    shares = [[share / sum(row) for share in row] for row in shares]
    expected = sum(-share * math.log(share) for row in shares for share in row) / NUM_TOKENS
    assert metrics["entropy"] == pytest.approx(expected, abs=1e-6)


def test_batches_and_processes_add_up(router_logits):
    first, second = (RouterStatistics(2, NUM_EXPERTS) for _ in range(2))
    for statistics, batches in (
        (first, [(router_logits[:10], router_logits[27:]), (router_logits[10:15], router_logits[:5])]),
        (second, [(router_logits[15:], router_logits[5:27])]),
    ):
        for batch in batches:
            statistics.update(batch, [_selected(layer) for layer in batch], _config())

    for metrics in first.unflatten(first.flatten() + second.flatten()).metrics():
        _assert_equal(metrics, _naive(router_logits, TOP_K))


def test_layers_add_up_one_by_one(router_logits):
    layers = [router_logits, router_logits.flip(0) * 2]
    together, apart = (RouterStatistics(2, NUM_EXPERTS) for _ in range(2))
    together.update(layers, [_selected(layer) for layer in layers], _config())

    for number in (1, 0):
        for tokens in layers[number].split(20):
            apart.update_layer(number, tokens, _selected(tokens), tokens.log_softmax(dim=-1))

    for metrics, expected in zip(apart.metrics(), together.metrics(), strict=True):
        _assert_equal(metrics, expected)


@pytest.mark.parametrize("weights", [None, (torch.arange(NUM_TOKENS) % 3 != 0).float()])
def test_a_large_batch_is_counted_in_small_parts(monkeypatch, router_logits, weights):
    monkeypatch.setattr(routing, "CHUNK_TOKENS", 8)
    sizes = []

    def measured(logits, config, _function=routing.routing_log_probabilities):
        sizes.append(logits.shape[1])
        return _function(logits, config)

    monkeypatch.setattr(routing, "routing_log_probabilities", measured)
    _assert_equal(_metrics(router_logits, TOP_K, weights), _naive(router_logits, TOP_K, weights))
    assert sizes == [8, 8, 8, 8, 5]


def test_statistics_hold_no_graph(router_logits):
    statistics = RouterStatistics(1, NUM_EXPERTS)
    statistics.update([router_logits.requires_grad_()], [_selected(router_logits)], _config())

    assert not statistics.flatten().requires_grad
