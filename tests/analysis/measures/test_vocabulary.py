"""Vocabulary specialisation against a count token for token."""

import json
from collections import Counter, defaultdict
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from routed_blocks import block_of, random_selection, routed_blocks

from upcycled_moe.analysis.measures import Subject, vocabulary
from upcycled_moe.analysis.measures.independent_counts import largest_counts_bound
from upcycled_moe.analysis.measures.vocabulary import VocabularySpecialization, best_experts, share_by_load


VOCAB_SIZE = 50


def _subject(num_experts, num_domains=1, num_layers=1, tokenizer=None):
    layer = SimpleNamespace(
        num_experts=num_experts, num_experts_per_tok=2, config=SimpleNamespace(vocab_size=VOCAB_SIZE)
    )
    domains = [f"domain{domain}" for domain in range(num_domains)]
    return Subject([layer] * num_layers, domains, torch.device("cpu"), tokenizer)


def _measured(subject, *batches, number=0):
    measure = VocabularySpecialization(subject)
    for batch in batches:
        measure.update(number, batch)
    return measure.result()


def _routed(ids, experts, num_experts, domain=0):
    """One block of these token ids, whose best experts these are."""
    return routed_blocks(torch.tensor([experts])[..., None], num_experts, domain=domain, input_ids=torch.tensor([ids]))


def _random(num_blocks=6, block_size=50, num_experts=4, empty=0.0, domain=0, seed=0):
    """Frequent and rare token ids; the expert follows the token half of the time."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(num_blocks, block_size, generator=generator).square() * VOCAB_SIZE).long()
    selected = random_selection(num_blocks, block_size, num_experts, 2, seed=seed, empty=empty)
    follows = torch.rand(num_blocks, block_size, generator=generator) < 0.5
    bound = torch.stack([ids % num_experts, (ids + 1) % num_experts], dim=-1)
    return routed_blocks(torch.where(follows[..., None], bound, selected), num_experts, domain=domain, input_ids=ids)


def _naive(tokens, num_experts):
    """The share of the most frequent expert of each token id that is frequent enough."""
    counts = defaultdict(Counter)
    for token, scores, selected in zip(
        tokens.input_ids.flatten().tolist(), tokens.log_probabilities.tolist(), tokens.selected.tolist(), strict=True
    ):
        filled = [expert for expert in selected if expert < num_experts]
        if filled:
            counts[token][max(filled, key=lambda expert: scores[expert])] += 1
    return {
        token: (*max(((count, -expert) for expert, count in of_token.items())), of_token.total())
        for token, of_token in counts.items()
        if of_token.total() >= 10
    }


def test_two_words_by_hand():
    """Token 7: nine times expert 0, three times expert 1. Token 8: ten times expert 2. Token 9 is too rare."""
    tokens = _routed([7] * 12 + [8] * 10 + [9] * 2, [0] * 9 + [1] * 3 + [2] * 10 + [1] * 2, 3)

    result = _measured(_subject(3), tokens)

    assert result.per_layer["vocabulary_specialization"] == [pytest.approx((9 / 12 + 1) / 2)]
    assert result.tables["coverage"] == [pytest.approx(22 / 24)]
    assert result.tables["tokens"] == [
        [
            [{"id": 7, "token": None, "share": 0.75, "occurrences": 12}],
            [],
            [{"id": 8, "token": None, "share": 1.0, "occurrences": 10}],
        ]
    ]
    loads = torch.tensor([9 / 24, 5 / 24, 10 / 24])
    ten, twelve = (largest_counts_bound(number, loads, 1) / number for number in (10, 12))
    assert result.per_layer["vocabulary_specialization_by_load"] == [pytest.approx((ten + twelve) / 2)]
    assert result.notes == []


@pytest.mark.parametrize("empty", [0.0, 0.6])
def test_tokens_are_counted_by_their_best_expert(empty):
    tokens = _random(empty=empty)
    expected = _naive(tokens, 4)

    result = _measured(_subject(4), tokens)

    shares = [count / occurrences for count, _, occurrences in expected.values()]
    assert result.per_layer["vocabulary_specialization"] == [pytest.approx(sum(shares) / len(shares))]
    listed = {
        one["id"]: (one["share"], expert)
        for expert, of_expert in enumerate(result.tables["tokens"][0])
        for one in of_expert
    }
    assert listed
    for token, (share, expert) in listed.items():
        count, negative, occurrences = expected[token]
        assert (share, expert) == (pytest.approx(count / occurrences), -negative)


def test_the_best_expert_has_the_highest_score_and_not_the_first_slot():
    log_probabilities = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.5, 0.2, 0.3]]).log()
    selected = torch.tensor([[[2, 1], [3, 2], [3, 3]]])

    tokens = routed_blocks(selected, 3, log_probabilities=log_probabilities)

    assert best_experts(tokens).tolist() == [1, 2, 3]


def test_listed_tokens_have_the_largest_shares_and_among_equals_the_most_occurrences():
    ids, experts = [], []
    for token, (own, other) in enumerate([(10, 0), (20, 0), (9, 1), (8, 2), (18, 2), (30, 10), (5, 5)]):
        ids += [token] * (own + other)
        experts += [0] * own + [1] * other

    result = _measured(_subject(2), _routed(ids, experts, 2))

    assert [one["id"] for one in result.tables["tokens"][0][0]] == [1, 0, 4, 2, 3]


def test_tokens_are_written_as_text():
    tokenizer = SimpleNamespace(decode=lambda ids: f" word{ids[0]}")

    result = _measured(_subject(2, tokenizer=tokenizer), _routed([3] * 10, [1] * 10, 2))

    assert result.tables["tokens"][0][1][0]["token"] == " word3"


def test_routing_that_knows_no_words_scores_as_the_loads_say():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB_SIZE, (20, 500), generator=generator)
    tokens = routed_blocks(random_selection(20, 500, 8, 1), 8, input_ids=ids)

    result = _measured(_subject(8), tokens)

    [share], [bound] = result.per_layer.values()
    assert 0.95 * bound < share < bound + 0.005


def test_routing_by_words_scores_above_the_loads():
    result = _measured(_subject(4), _random())

    [share], [bound] = result.per_layer.values()
    assert share > bound + 0.05


@pytest.mark.parametrize(
    "loads",
    [(0.5, 0.3, 0.2), (0.9, 0.05, 0.05), (1 / 8,) * 8, (1 / 64,) * 64, [number / 2080 for number in range(1, 65)]],
    ids=lambda loads: f"{max(loads):.3f} of {len(loads)}",
)
def test_chance_is_close_to_the_bound_for_any_number_of_occurrences(loads):
    loads = torch.tensor(loads)
    occurrences = [10, 11, 12, 13, 14, 18, 33, 40, 77, 123, 250, 999, 1000, 1500, 5000, 20000]

    shares = share_by_load(torch.tensor(occurrences), loads).tolist()
    alone = share_by_load(torch.tensor(occurrences[5:6]), loads).tolist()

    assert alone == [pytest.approx(shares[5])]
    exact = [largest_counts_bound(number, loads, 1) / number for number in occurrences]
    assert shares[:9] == pytest.approx(exact[:9])
    assert shares == pytest.approx(exact, rel=0.03)


def test_a_large_vocabulary_is_counted_in_part(monkeypatch):
    """Four rows for each of two domains: each counts the token ids that it shows first."""
    monkeypatch.setattr(vocabulary, "MAX_COUNTS", 2 * 4 * 3)
    first = _routed([9, 9, 1, 3, 5, 7] * 10, [0] * 60, 2)
    second = _routed([1, 20, 21, 22, 23, 24, 7, 9] * 10, [1] * 80, 2, domain=1)

    result = _measured(_subject(2, 2), first, second)

    # Within a block the smallest ids come first.
    listed = {one["id"]: one["occurrences"] for of_expert in result.tables["tokens"][0] for one in of_expert}
    assert listed == {1: 20, 3: 10, 5: 10, 7: 20, 9: 10, 20: 10, 21: 10, 22: 10}
    assert result.tables["coverage"] == [pytest.approx(100 / 140)]
    assert "8 of 50 token ids" in result.notes[0]
    assert "number of layers or experts count others" in result.notes[0]


def test_token_ids_that_come_first_are_counted_whatever_the_batch(monkeypatch):
    """Three rows: for 30 and 31 of the first block, and for 1 of the second, though its ids are smaller."""
    monkeypatch.setattr(vocabulary, "MAX_COUNTS", 3 * 3)
    ids = torch.tensor([[30, 31] * 10, [1, 2] * 10])
    tokens = routed_blocks(torch.zeros(2, 20, 1, dtype=torch.long), 2, input_ids=ids)

    together = _measured(_subject(2), tokens)
    apart = _measured(_subject(2), block_of(tokens, 0), block_of(tokens, 1))

    assert {one["id"] for one in together.tables["tokens"][0][0]} == {1, 30, 31}
    assert apart == together


@pytest.mark.parametrize("max_counts", [2**26, 3 * 5 * 7])
def test_batches_do_not_matter(monkeypatch, max_counts):
    monkeypatch.setattr(vocabulary, "MAX_COUNTS", max_counts)
    tokens = _random()
    whole = _measured(_subject(4), tokens)

    in_parts = _measured(_subject(4), block_of(tokens, 0), block_of(tokens, 1, 2, 3), block_of(tokens, 4, 5))

    assert in_parts == whole


def test_all_layers_count_the_same_token_ids(monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_COUNTS", 2 * 5 * 7)
    measure = VocabularySpecialization(_subject(4, num_layers=2))
    tokens = _random()
    for batch in (block_of(tokens, 0, 1), block_of(tokens, 2, 3, 4, 5)):
        for number in range(2):
            measure.update(number, batch)

    result = measure.result()

    assert result.tables["tokens"][0] == result.tables["tokens"][1]
    assert result.per_layer["vocabulary_specialization"][0] == result.per_layer["vocabulary_specialization"][1]


def test_rare_token_ids_have_no_figures():
    result = _measured(_subject(2), _routed(list(range(20)), [0] * 20, 2))

    assert result.per_layer == {"vocabulary_specialization": [None], "vocabulary_specialization_by_load": [None]}
    assert result.tables == {"tokens": [[[], []]], "coverage": [0.0]}
    assert "10 times" in result.notes[0]
    json.dumps(asdict(result), allow_nan=False)
