"""Which experts of a layer are kept, and which of them take in the others.

Dimensions: C experts with weights of their own, P parts of neighbouring experts of equal size, G slices of an FFN.

Parts are what cannot do without some of its experts: the groups that a selection takes experts from, the slices of an
FFN, the experts of a node. Each keeps as many, and its experts are merged among themselves.

Where experts are slices, expert `g * C / G + c` is slice g of copy c, and copies go or stay whole: a token that gets
some slices of a copy and not the others gets no FFN.
"""

import math

from torch import Tensor

from modeling_upcycled_moe import UpcycledQwenMoeConfig

from ..common.settings import SettingsError


def num_parts(config: UpcycledQwenMoeConfig, num_slices: int, num_experts: int) -> int:
    """Return P for a model with `config`, of which `num_experts` experts are kept in each layer.

    Args:
        num_slices: G; 1 where each expert is a whole FFN.

    Raises:
        SettingsError: if it has no more experts than that, or the parts cannot keep equal numbers.
    """
    if num_experts >= config.num_experts:
        raise SettingsError(
            f"num_experts={num_experts} must be below the {config.num_experts} experts that the layers have; lower it."
        )
    parts = {
        "num_expert_groups": config.num_expert_groups or 1,
        "expert_granularity": num_slices,
        "expert_nodes": _num_nodes(config),
    }
    reasons = {
        "num_expert_groups": "a token goes to the same number of experts in every group",
        "expert_granularity": "the experts are slices of an FFN, and each slice needs as many copies",
        "expert_nodes": "every node needs as many experts",
    }
    for name, count in parts.items():
        if num_experts % count:
            raise SettingsError(
                f"num_experts={num_experts} is not a multiple of the {count} of {name}: {reasons[name]}; give a "
                "multiple."
            )
    common = math.lcm(*parts.values())
    if num_experts % common:
        raise SettingsError(
            f"num_experts={num_experts} is not a multiple of {common}, as {', '.join(parts)} ask for together; give a "
            "multiple."
        )
    return common


def _num_nodes(config: UpcycledQwenMoeConfig) -> int:
    if config.expert_nodes is None:
        return 1
    nodes = config.expert_nodes[: config.num_experts]
    num_nodes = len(set(nodes))
    shares = [nodes[first :: config.num_experts // num_nodes] for first in range(config.num_experts // num_nodes)]
    # The layers keep different experts, and one list of nodes is for all.
    if any(len(set(share)) != num_nodes or share != shares[0] for share in shares):
        raise SettingsError(
            f"expert_nodes={config.expert_nodes} does not give every node as many neighbouring experts, so that no "
            "list fits the experts that all layers keep; set router_locality_loss_coef to 0 in config.json, and "
            "expert_nodes to null."
        )
    return num_nodes


def kept_experts(scores: Tensor, num_kept: int, parts: int, num_slices: int = 1) -> list[int]:
    """Return the numbers, in their order, of the `num_kept` experts with the best `scores` [C].

    Each of the P `parts`, a multiple of G, keeps as many. Of slices the copies are kept whose scores have the highest
    sums. Of equal experts the first are kept.
    """
    values = scores.unflatten(0, (num_slices, -1)).sum(dim=0).tolist()
    size = len(scores) // parts
    kept = []
    for first in range(0, len(values), size):
        ranked = sorted(range(first, first + size), key=lambda copy: -values[copy])
        kept += ranked[: num_kept // parts]
    return [number * len(values) + copy for number in range(num_slices) for copy in sorted(kept)]


def merge_groups(similarity: Tensor, kept: list[int], parts: int, num_slices: int = 1) -> list[list[int]]:
    """Return a group for each of the experts `kept`: itself, then those that are merged into it.

    Every other expert goes to the kept one of its part that it is most similar to. Slices go as their copies do, by
    the sum of the similarities of their slices.

    Args:
        similarity: of each two experts [C, C].

    Source: M-SMoE (arXiv 2310.01334), its grouping around the dominant experts.
    """
    size, num_copies = len(similarity) // parts, len(similarity) // num_slices
    slices = similarity.unflatten(0, (num_slices, -1)).unflatten(2, (num_slices, -1))  # [G, C / G, G, C / G]
    alike = slices.diagonal(dim1=0, dim2=2).sum(dim=-1).tolist()  # [C / G, C / G]
    groups = {copy: [copy] for copy in kept if copy < num_copies}
    staying = list(groups)
    for copy in range(num_copies):
        if copy not in groups:
            near = [other for other in staying if other // size == copy // size]
            groups[max(near, key=lambda other: alike[copy][other])].append(copy)
    return [
        [number * num_copies + copy for copy in group] for number in range(num_slices) for group in groups.values()
    ]
