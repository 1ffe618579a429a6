"""How routers start: queries and keys from the attention heads of the same layer, or random.

Dimensions: n attention heads of size h, H hidden size, E experts, R routers, J keys, D router head size. A *unit* is
what is joined into routers: a head, or a part of one where there are more routers than heads.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.settings import SettingsError
from .experts import FileBytes
from .recipe import ConversionRecipe
from .source import DenseSource, SourceTensor


# Two keys closer than this part of their length score every token alike, and the later expert hardly gets one.
COINCIDING_DISTANCE = 1e-3


@dataclass(frozen=True)
class HeadSplit:
    """How the attention heads of a layer become routers and keys.

    Args:
        num_units: heads, or parts of heads.
        unit_size: rows of the query projection in a unit.
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
    two routers). R above n splits each head in R/n parts. There are max(R, E) keys.

    Raises:
        SettingsError: if the heads cannot be split or joined so.
    Source: Router Upcycling (arXiv 2509.00679), sections 3.2 and 6.1.
    """
    num_heads, head_dim = source.config.num_attention_heads, source.head_dim
    num_routers = recipe.num_routers or recipe.num_experts
    num_keys = max(num_routers, recipe.num_experts)
    if num_keys % recipe.num_experts:
        raise SettingsError(
            f"num_routers={num_routers} is above num_experts={recipe.num_experts} and not a multiple of it: every "
            "expert owns the same number of keys."
        )
    parts = 1
    if num_routers > num_heads:
        parts, remainder = divmod(num_routers, num_heads)
        if remainder or head_dim % parts:
            raise SettingsError(
                f"num_routers={num_routers}: {num_heads} heads of {head_dim} do not split into as many equal parts; "
                f"use at most {num_heads} routers, or a multiple of it."
            )
    num_units = num_heads * parts
    heads_per_router = recipe.heads_per_router or -(-num_units // num_routers)
    if heads_per_router > num_units:
        raise SettingsError(f"heads_per_router={heads_per_router} exceeds the {num_units} heads that there are.")
    statistic = recipe.key_statistic
    if statistic == "auto":
        statistic = "mean" if source.config.num_key_value_heads == num_heads else "attended"
    return HeadSplit(num_routers, num_keys, num_units, head_dim // parts, heads_per_router, statistic)


def group_heads(similarity: Tensor, num_groups: int, group_size: int) -> list[list[int]]:
    """Return `num_groups` groups of `group_size` different units, greedily the most alike together.

    A group starts with the most similar pair, then takes the unit with the highest mean similarity to it. Units that
    served least come first, so each serves once before any serves twice. A pair that was together before starts no
    other group, and the last unit makes no group that is there already, as long as the units leave a choice.

    Args:
        similarity: [n, n], symmetric.
    Source: Router Upcycling (arXiv 2509.00679), section 3.2; the rule for units that serve more than once is ours.
    """
    num_units = similarity.shape[0]
    scores = similarity.tolist()
    uses = [0] * num_units
    together: set[tuple[int, int]] = set()
    groups: list[list[int]] = []
    for _ in range(num_groups):
        group: list[int] = []
        while len(group) < group_size:
            candidates = _least_used(uses, exclude=group)
            pairs = [(a, b) for a in candidates for b in candidates if a < b]
            if not group and pairs and group_size > 1:
                fresh = [pair for pair in pairs if pair not in together] or pairs
                group.extend(max(fresh, key=lambda pair: scores[pair[0]][pair[1]]))
            else:
                if len(group) == group_size - 1:
                    candidates = [unit for unit in candidates if {*group, unit} not in map(set, groups)] or candidates
                group.append(max(candidates, key=lambda unit: sum(scores[unit][member] for member in group)))
        for unit in group:
            uses[unit] += 1
        together |= {(a, b) for a in group for b in group if a < b}
        groups.append(group)
    return groups


def _least_used(uses: list[int], exclude: list[int]) -> list[int]:
    rest = [unit for unit in range(len(uses)) if unit not in exclude]
    least = min(uses[unit] for unit in rest)
    return [unit for unit in rest if uses[unit] == least]


def cosine_similarity(units: Tensor) -> Tensor:
    """Return the cosine similarity [n, n] of `units` [n, ...], each taken as one vector."""
    flat = F.normalize(units.flatten(1).double(), dim=-1)
    return flat @ flat.T


def query_rows(q_proj: SourceTensor, split: HeadSplit) -> FileBytes:
    """Return the content of `query_weight` [R, D, H]: rows of `q_proj` [n * h, H], joined greedily.

    These are the source's own bytes. The query bias is left out: it would favour the same experts for every token.
    """
    units = q_proj.load().unflatten(0, (split.num_units, split.unit_size))
    groups = group_heads(cosine_similarity(units), split.num_routers, split.heads_per_router)
    unit_bytes = q_proj.num_bytes // split.num_units
    return FileBytes(tuple((q_proj, unit * unit_bytes, unit_bytes) for group in groups for unit in group))


def expert_keys(head_keys: Tensor, split: HeadSplit) -> Tensor:
    """Return the keys [J, D]: the average keys of the heads [n, h], joined greedily."""
    units = head_keys.reshape(split.num_units, split.unit_size)
    groups = group_heads(cosine_similarity(units), split.num_keys, split.heads_per_router)
    return units[torch.tensor(groups)].flatten(1)


def coinciding_keys(keys: Tensor) -> int:
    """Return how many of the keys [J, D] equal an earlier one, to a thousandth of their length."""
    keys = keys.double()
    lengths = keys.norm(dim=-1)
    coincide = torch.cdist(keys, keys) <= COINCIDING_DISTANCE * torch.maximum(lengths[:, None], lengths[None, :])
    return int(coincide.tril(diagonal=-1).any(dim=1).sum())


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """Return the generator of the tensor `name`, which depends on nothing else: not on order, shards or threads."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_router(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Return a router weight [E, H] drawn from N(0, std), as vanilla upcycling starts."""
    return torch.empty(shape).normal_(0.0, std, generator=generator)
