"""Local routing consistency against segments counted one by one."""

import pytest
import torch
from routed import measured, subject
from routed_blocks import block_of, random_selection, routed_blocks

from upcycled_moe.analysis.measures import local_consistency
from upcycled_moe.analysis.measures.local_consistency import LocalConsistency


@pytest.fixture
def lengths(monkeypatch):
    """`lengths(2, 3)`: measure segments of these lengths, the first for the figures of a layer."""

    def use(*lengths):
        monkeypatch.setattr(local_consistency, "SEGMENT_LENGTHS", lengths)
        monkeypatch.setattr(local_consistency, "MAIN_LENGTH", lengths[0])

    return use


def _naive(selected, documents, num_experts, length, cache_size):
    """SRP and SCH of blocks [B][S] of lists of experts, whose tokens have these documents [B][S]."""
    segments = [
        [sum(expert in token for token in block[begin : begin + length]) for expert in range(num_experts)]
        for block, numbers in zip(selected, documents, strict=True)
        for begin in range(len(block) - length + 1)
        if len(set(numbers[begin : begin + length])) == 1
    ]
    counts = [count for segment in segments for count in segment]
    performances = [
        2 * sum(chosen) / (length * len(chosen) + sum(counts))
        for threshold in range(length + 1)
        for chosen in [[count for count in counts if count >= threshold]]
    ]
    hits = sum(sum(sorted(segment, reverse=True)[:cache_size]) for segment in segments)
    return max(performances), hits / sum(counts)


def test_one_expert_a_token_by_hand(lengths):
    """Experts 0 0 1 1 2: segments of two have the counts (2,0,0) (1,1,0) (0,2,0) (0,1,1).

    With the threshold 1 six pairs are predicted, 12 of tokens, 8 of them right and all 8 found: 16 / 20. With 2 there
    are 2 pairs, 4 of tokens, all right: 8 / 12. A cache of one expert serves 2 + 1 + 2 + 1 of 8.
    """
    lengths(2)

    result = measured(LocalConsistency, subject(1, 3, 1), routed_blocks(torch.tensor([[[0], [0], [1], [1], [2]]]), 3))

    assert result.per_layer["srp"] == [pytest.approx(0.8)]
    assert result.tables["sch"] == [[[pytest.approx(0.75), 1.0, 1.0]]]
    assert result.tables["cache_sizes"] == [1, 2, 3]
    assert result.tables["segments"] == [4]
    # Two tokens: counts 0, 1, 2 of an expert with share a come with (1 - a)², 2 a (1 - a) and a².
    shares = (0.4, 0.4, 0.2)
    once, twice = (sum(2 * a * (1 - a) for a in shares), sum(a * a for a in shares))
    with_one, with_two = (
        2 * (once + 2 * twice) / (2 * (once + twice) + 2),
        2 * (2 * twice) / (2 * twice + 2),
    )
    assert result.per_layer["srp_by_load"] == [pytest.approx(max(with_one, with_two))]


def test_tokens_with_the_same_experts_are_served_wholly():
    tokens = routed_blocks(torch.tensor([4, 1]).expand(1, 300, 2), 6)

    result = measured(LocalConsistency, subject(1, 6, 2), tokens)

    assert result.tables["srp"] == [[1.0] * 4]
    assert result.tables["sch"] == [[[1.0] * 3] * 4]
    # So are independent tokens that have no choice.
    assert result.tables["srp_by_load"] == [[pytest.approx(1.0)] * 4]


@pytest.mark.parametrize(("num_slots", "empty"), [(1, 0.0), (3, 0.0), (2, 0.3)])
def test_each_segment_counts(lengths, num_slots, empty):
    lengths(3, 1, 8)
    selected = random_selection(4, 20, 7, num_slots, empty=empty)
    # The first block begins within a document, the second has three, the third none that is long.
    positions = torch.stack(
        [
            torch.arange(5, 25),
            torch.cat([torch.arange(4), torch.arange(9), torch.arange(7)]),
            torch.arange(20) % 4,
            torch.arange(20),
        ]
    )
    documents = [[sum(p == 0 for p in block[: at + 1]) for at in range(20)] for block in positions.tolist()]

    result = measured(LocalConsistency, subject(1, 7, num_slots), routed_blocks(selected, 7, position_ids=positions))

    sizes = [num_slots, 2 * num_slots, min(4 * num_slots, 7)]
    assert result.tables["cache_sizes"] == sizes
    for at, length in enumerate((3, 1, 8)):
        for column, size in enumerate(sizes):
            srp, sch = _naive(selected.tolist(), documents, 7, length, size)
            assert result.tables["srp"][0][at] == pytest.approx(srp)
            assert result.tables["sch"][0][at][column] == pytest.approx(sch)
    assert result.per_layer["sch"] == [result.tables["sch"][0][0][1]]
    assert result.tables["segments"] == [18 + (2 + 7 + 5) + 5 * 2 + 18, 80, 13 + 2 + 0 + 13]


def test_routing_without_locality_scores_as_the_loads_say():
    tokens = routed_blocks(random_selection(40, 500, 8, 2), 8)

    result = measured(LocalConsistency, subject(1, 8, 2), tokens)

    assert result.tables["srp"][0] == pytest.approx(result.tables["srp_by_load"][0], abs=0.005)
    for rates, bounds in zip(result.tables["sch"][0], result.tables["sch_by_load"][0], strict=True):
        for rate, bound in zip(rates, bounds, strict=True):
            assert 0.95 * bound < rate < bound + 0.003


def test_runs_of_the_same_experts_score_above_the_loads():
    """Each choice of experts holds for 16 tokens, so that the loads stay as they are."""
    tokens = routed_blocks(random_selection(20, 20, 8, 2).repeat_interleave(16, dim=1), 8)

    result = measured(LocalConsistency, subject(1, 8, 2), tokens)

    assert result.per_layer["srp"][0] > result.per_layer["srp_by_load"][0] + 0.1
    assert result.per_layer["sch"][0] > result.per_layer["sch_by_load"][0] + 0.05


def test_batches_do_not_matter(monkeypatch):
    tokens = routed_blocks(random_selection(5, 40, 6, 2, empty=0.2), 6)
    whole = measured(LocalConsistency, subject(1, 6), tokens)

    in_parts = measured(LocalConsistency, subject(1, 6), block_of(tokens, 3), block_of(tokens, 0, 4, 1, 2))
    monkeypatch.setattr(local_consistency, "CHUNK_COUNTS", 2 * 40 * 6)
    in_chunks = measured(LocalConsistency, subject(1, 6), tokens)

    assert in_parts == whole
    assert in_chunks == whole


def test_there_are_no_long_segments_in_short_documents():
    result = measured(LocalConsistency, subject(1, 6), routed_blocks(random_selection(2, 20, 6, 2), 6))

    assert result.tables["segments"] == [34, 10, 0, 0]
    assert [value is None for value in result.tables["srp"][0]] == [False, False, True, True]
    assert [rates[0] is None for rates in result.tables["sch"][0]] == [False, False, True, True]
    assert "64 tokens" in result.notes[0]


def test_a_cache_of_all_experts_is_said_to_be_one():
    result = measured(LocalConsistency, subject(1, 4), routed_blocks(random_selection(1, 20, 4, 2), 4))

    assert result.per_layer["sch"] == [1.0]
    assert "holds all of them" in result.notes[0]


def test_a_layer_without_tokens_has_no_figures():
    tokens = routed_blocks(random_selection(1, 20, 6, 2), 6)

    result = measured(LocalConsistency, subject(1, 6, num_layers=2), tokens, number=0)

    assert [values[1] for values in result.per_layer.values()] == [None] * 4
    assert None not in [values[0] for values in result.per_layer.values()]


def test_chance_stands_beside_what_was_measured_only():
    """No segment of 64 tokens in a block of 20; a cache of all experts serves all."""
    tokens = routed_blocks(random_selection(2, 20, 7, 2), 7)

    tables = measured(LocalConsistency, subject(1, 7), tokens).tables

    assert tables["cache_sizes"] == [2, 4, 7]
    assert [each[2] for each in tables["sch_by_load"][0]] == [1.0, 1.0, None, None]
    for name in ("srp", "sch"):
        is_missing = [each is None or each == [None] * 3 for each in tables[name][0]]
        assert is_missing == [each is None or each == [None] * 3 for each in tables[f"{name}_by_load"][0]]
        assert is_missing == [False, False, True, True]
