"""Which experts are kept and grouped, and what the parts of a model ask for."""

import pytest
import torch
from moe_checkpoints import SHAPE

from modeling_upcycled_moe import UpcycledQwenMoeConfig
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.pruning.choice import kept_experts, merge_groups, num_parts


def _config(**fields):
    return UpcycledQwenMoeConfig(**{**SHAPE, "num_experts": 12, "moe_intermediate_size": 24, **fields})


def test_the_best_are_kept_in_their_order():
    scores = torch.tensor([0.1, 0.5, 0.2, 0.4, 0.3])
    assert kept_experts(scores, 3, parts=1) == [1, 3, 4]


def test_of_equal_experts_the_first_are_kept():
    assert kept_experts(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2, parts=1) == [0, 1]


def test_each_part_keeps_as_many():
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
    assert kept_experts(scores, 2, parts=2) == [0, 4]
    assert kept_experts(scores, 4, parts=2) == [0, 1, 4, 5]


def test_copies_of_slices_are_kept_whole():
    """The best by the sum of their slices, which need be the best in no slice."""
    scores = torch.tensor([9.0, 6.0, 0.0, 0.0, 6.0, 8.0])
    assert kept_experts(scores, 2, parts=2, num_slices=2) == [1, 4]
    assert kept_experts(scores, 4, parts=2, num_slices=2) == [0, 1, 3, 4]
    # Two groups cut each slice in two.
    scores = torch.tensor([9.0, 0.0, 1.0, 3.0, 0.0, 8.0, 3.0, 2.0])
    assert kept_experts(scores, 4, parts=4, num_slices=2) == [0, 3, 4, 7]


def test_copies_of_slices_are_grouped_whole():
    similarity = torch.eye(6)
    # Slice 0 of copy 2 is most like that of copy 0, but both of its slices together are more like copy 1.
    for first, second, value in ((0, 2, 0.6), (1, 2, 0.5), (3, 5, 0.1), (4, 5, 0.4), (0, 5, 9.0)):
        similarity[first, second] = similarity[second, first] = value
    kept = [0, 1, 3, 4]
    assert merge_groups(similarity, kept, parts=2, num_slices=2) == [[0], [1, 2], [3], [4, 5]]


def test_others_go_to_the_kept_one_that_they_are_most_similar_to():
    similarity = torch.tensor([[1.0, 0.2, 0.9, 0.1], [0.2, 1.0, 0.3, 0.6], [0.9, 0.3, 1.0, 0.4], [0.1, 0.6, 0.4, 1.0]])
    assert merge_groups(similarity, [0, 1], parts=1) == [[0, 2], [1, 3]]
    assert merge_groups(similarity, [2, 3], parts=1) == [[2, 0], [3, 1]]


def test_groups_stay_within_a_part():
    similarity = torch.eye(4)
    similarity[0, 3] = similarity[3, 0] = similarity[1, 2] = similarity[2, 1] = 0.9
    assert merge_groups(similarity, [0, 2], parts=2) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("fields", "num_slices", "num_experts", "expected"),
    [
        ({}, 1, 5, 1),
        ({"router_selection": "grouped_top_k", "num_expert_groups": 2}, 1, 4, 2),
        ({}, 2, 6, 2),
        ({"num_experts_per_tok": 3, "router_selection": "grouped_top_k", "num_expert_groups": 3}, 2, 6, 6),
        ({"expert_nodes": [0] * 4 + [2] * 4 + [1] * 4}, 1, 3, 3),
    ],
)
def test_parts_are_groups_slices_and_nodes(fields, num_slices, num_experts, expected):
    assert num_parts(_config(**fields), num_slices, num_experts) == expected


@pytest.mark.parametrize(
    ("fields", "num_slices", "num_experts", "message"),
    [
        ({}, 1, 12, "num_experts=12 must be below the 12 experts"),
        ({"router_selection": "grouped_top_k", "num_expert_groups": 2}, 1, 5, "the 2 of num_expert_groups"),
        ({}, 2, 5, "the 2 of expert_granularity: the experts are slices"),
        ({"expert_nodes": [0, 1] * 6}, 1, 6, "does not give every node as many neighbouring experts"),
        ({"expert_nodes": [0] * 4 + [1] * 8}, 1, 6, "does not give every node as many neighbouring experts"),
        (
            {"num_experts_per_tok": 4, "router_selection": "grouped_top_k", "num_expert_groups": 4},
            3,
            4,
            "the 3 of expert_granularity",
        ),
    ],
)
def test_numbers_that_parts_cannot_keep_are_errors(fields, num_slices, num_experts, message):
    with pytest.raises(SettingsError, match=message):
        num_parts(_config(**fields), num_slices, num_experts)
