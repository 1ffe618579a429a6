"""Attention heads as routers: which heads join, and what queries and keys they give.

Dimensions: n attention heads of size h, H hidden size, E experts that are told apart, R routers, J keys, D router head
size. A *unit* is what is joined into routers: a head, or a part of one where there are more routers than heads.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from ..common.settings import SettingsError
from ..common.streaming.contents import FileBytes
from ..common.streaming.stored import StoredTensor
from .recipe import ConversionRecipe
from .source import DenseSource


# Two keys closer than this part of their length score every token alike, and the later expert hardly gets one.
COINCIDING_DISTANCE = 1e-3
COLUMNS_AT_A_TIME = 2**18


@dataclass(frozen=True)
class HeadSplit:
    """How the attention heads of a layer become routers and keys.

    Args:
        num_units: heads, or parts of heads.
        unit_size: rows of the query projection in a unit.
        num_keys: keys of all experts that are told apart.
        heads_per_router: units joined into one router, and into one key.
        key_statistic: `mean` or `attended`.
    """

    num_routers: int
    num_keys: int
    num_units: int
    unit_size: int
    heads_per_router: int
    key_statistic: str

    @property
    def router_head_dim(self) -> int:
        """Width D of a router's query and of a key."""
        return self.heads_per_router * self.unit_size


def head_split(source: DenseSource, recipe: ConversionRecipe) -> HeadSplit:
    """Return how `recipe` splits and joins the heads of `source`.

    With R routers for n heads, n/R heads make a router (rounded up: where R does not divide n, some heads serve in
    two routers). R above n splits each head in R/n parts. There are max(R, E) keys. If nothing else is asked for, R is
    the number of experts that compute, but at most n, since parts of heads are too narrow to tell many experts apart;
    and so many heads are joined that all routers and keys can differ. Slices of one copy (`experts="split"`) are one
    expert here: they share their keys.

    Raises:
        SettingsError: if the heads cannot be split or joined so.
    Source: Router Upcycling (arXiv 2509.00679), sections 3.2 and 6.1.
    """
    num_heads, head_dim = source.config.num_attention_heads, source.head_dim
    num_experts = recipe.num_distinct_experts
    num_routers = recipe.num_routers
    if num_routers is None:
        num_routers = min(recipe.num_ffn_copies, num_heads)
    num_keys = max(num_routers, num_experts)
    if num_keys % num_experts:
        raise SettingsError(
            f"num_routers={num_routers} is above {_described(recipe)} and not a multiple of it: every expert "
            "owns the same number of keys."
        )
    parts = _parts(num_routers, num_heads, head_dim)
    if parts is None:
        raise SettingsError(
            f"num_routers={num_routers}: {num_heads} heads of {head_dim} do not split into as many equal parts; "
            f"use at most {num_heads} routers, or a multiple of it."
        )
    num_units = num_heads * parts
    heads_per_router = recipe.heads_per_router
    if heads_per_router is None:
        heads_per_router = -(-num_units // num_routers)
        while math.comb(num_units, heads_per_router) < num_keys and heads_per_router < num_units // 2:
            heads_per_router += 1
    if heads_per_router > num_units:
        raise SettingsError(f"heads_per_router={heads_per_router} exceeds the {num_units} heads that there are.")
    statistic = recipe.key_statistic
    if statistic == "auto":
        statistic = "mean" if source.config.num_key_value_heads == num_heads else "attended"
    return HeadSplit(num_routers, num_keys, num_units, head_dim // parts, heads_per_router, statistic)


def _described(recipe: ConversionRecipe) -> str:
    """Return how many experts are told apart, in the recipe's words."""
    words = f"num_experts={recipe.num_experts}"
    if recipe.num_ffn_copies < recipe.num_experts:
        words += f" / expert_granularity={recipe.expert_granularity}"
    if recipe.num_free_experts:
        words += f" + {recipe.num_free_experts} experts without computation"
    return words


def _parts(num_routers: int, num_heads: int, head_dim: int) -> int | None:
    """Return into how many parts each head is split for so many routers; None if that does not come out even."""
    if num_routers <= num_heads:
        return 1
    parts, remainder = divmod(num_routers, num_heads)
    return None if remainder or head_dim % parts else parts


def group_heads(similarity: Tensor, num_groups: int, group_size: int) -> list[list[int]]:
    """Return `num_groups` groups of `group_size` different units, greedily the most alike together.

    A group starts with the most similar pair, then takes the unit with the highest mean similarity to it. Groups
    differ as long as there are different ones; then units that served less come before those that served more.

    Args:
        similarity: [n, n], symmetric.
    Source: Router Upcycling (arXiv 2509.00679), section 3.2; the rule for units that serve more than once is ours.
    """
    scores = similarity.tolist()
    units = range(similarity.shape[0])
    uses = [0] * len(units)
    together: Counter[tuple[int, int]] = Counter()  # groups with both units
    groups: list[list[int]] = []
    existing: set[frozenset[int]] = set()

    def pair_rank(pair: tuple[int, int]) -> tuple[int, float]:
        return uses[pair[0]] + uses[pair[1]], -scores[pair[0]][pair[1]]

    def unit_rank(unit: int, group: list[int]) -> tuple[int, float]:
        return uses[unit], -sum(scores[unit][member] for member in group)

    def is_open(pair: tuple[int, int]) -> bool:
        return together[pair] < math.comb(len(units) - 2, group_size - 2)

    for _ in range(num_groups):
        group: list[int] = []
        if group_size > 1:
            pairs = list(combinations(units, 2))
            # First pairs that were never together, then those that still begin a group that is not there.
            fresh = [pair for pair in pairs if pair not in together]
            group.extend(min(fresh or [pair for pair in pairs if is_open(pair)] or pairs, key=pair_rank))
        while len(group) < group_size:
            candidates = [unit for unit in units if unit not in group]
            if len(group) == group_size - 1:
                candidates = [unit for unit in candidates if {*group, unit} not in existing] or candidates
            group.append(min(candidates, key=partial(unit_rank, group=list(group))))
        for unit in group:
            uses[unit] += 1
        together.update(combinations(sorted(group), 2))
        groups.append(group)
        existing.add(frozenset(group))
    return groups


def random_groups(num_units: int, num_groups: int, group_size: int, generator: torch.Generator) -> list[list[int]]:
    """Return `num_groups` groups of `group_size` different units, drawn at random.

    As with `group_heads`, groups differ as long as there are different ones, and beyond that all units serve alike.

    Source: the ablation in section 3.2 of Router Upcycling (arXiv 2509.00679), which names no algorithm.
    """
    uses = [0] * num_units
    groups: list[list[int]] = []
    existing: set[frozenset[int]] = set()
    for _ in range(num_groups):
        order = sorted(torch.randperm(num_units, generator=generator).tolist(), key=uses.__getitem__)
        # Those that served least come first, and so does their combination.
        fresh = (group for group in combinations(order, group_size) if frozenset(group) not in existing)
        group = list(next(fresh, order[:group_size]))
        for unit in group:
            uses[unit] += 1
        groups.append(group)
        existing.add(frozenset(group))
    return groups


def cosine_similarity(units: Tensor) -> Tensor:
    """Return the cosine similarity [n, n] of `units` [n, ...], each taken as one vector."""
    gram = torch.zeros(len(units), len(units), dtype=torch.float64)
    # In pieces: the query projection of a large model would fill gigabytes in float64.
    for piece in units.flatten(1).split(COLUMNS_AT_A_TIME, dim=1):
        piece = piece.double()
        gram += piece @ piece.T
    lengths = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return gram / (lengths[:, None] * lengths[None, :])


def query_rows(q_proj: StoredTensor, split: HeadSplit, generator: torch.Generator | None = None) -> FileBytes:
    """Return the content of `query_weight` [R, D, H]: rows of `q_proj` [n * h, H], joined greedily or at random.

    These are the source's own bytes. The query bias is left out: it would favour the same experts for every token.

    Args:
        generator: draws the units that are joined; without it the most alike are.
    """
    units = q_proj.load().unflatten(0, (split.num_units, split.unit_size))
    groups = _groups(units, split.num_routers, split.heads_per_router, generator)
    unit_bytes = q_proj.num_bytes // split.num_units
    return FileBytes(tuple((q_proj, unit * unit_bytes, unit_bytes) for group in groups for unit in group))


def expert_keys(head_keys: Tensor, split: HeadSplit, generator: torch.Generator | None = None) -> Tensor:
    """Return the keys [J, D]: the average keys of the heads [n, h], joined greedily, or at random by `generator`."""
    units = head_keys.reshape(split.num_units, split.unit_size)
    groups = _groups(units, split.num_keys, split.heads_per_router, generator)
    return units[torch.tensor(groups)].flatten(1)


def _groups(units: Tensor, num_groups: int, group_size: int, generator: torch.Generator | None) -> list[list[int]]:
    if generator is not None:
        return random_groups(len(units), num_groups, group_size, generator)
    return group_heads(cosine_similarity(units), num_groups, group_size)


def coinciding_keys(keys: Tensor) -> int:
    """Return how many of the keys [J, D] equal an earlier one, to a thousandth of their length."""
    keys = keys.double()
    lengths = keys.norm(dim=-1)
    coincide = torch.cdist(keys, keys) <= COINCIDING_DISTANCE * torch.maximum(lengths[:, None], lengths[None, :])
    return int(coincide.tril(diagonal=-1).any(dim=1).sum())
