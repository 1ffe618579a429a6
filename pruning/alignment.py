"""Merging experts: neurons in the order of one of them, then the mean of the weights.

Dimensions: E experts, H hidden size, I width of an expert.

A neuron is a row of the gate and of the up projection and a column of the down projection; in another order they
compute the same, so that equal positions in two experts need not do equal things.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.settings import SettingsError
from ..common.streaming.contents import Computed, row_blocks
from ..common.streaming.stored import StoredTensor


@dataclass(frozen=True)
class FusedExperts:
    """The experts of a layer on disk: `gate_up` [E, 2I, H] and `down` [E, H, I]."""

    gate_up: StoredTensor
    down: StoredTensor

    @property
    def width(self) -> int:
        """I."""
        return self.down.shape[2]

    def neurons(self, expert: int) -> list[Tensor]:
        """Return gate, up and transposed down projection [I, H] of an expert, read from the file when used."""
        return [*self.gate_up.load()[expert].unflatten(0, (2, -1)), self.down.load()[expert].T]


@dataclass(frozen=True, eq=False)
class MergedExpert:
    """The weighted mean of experts.

    Args:
        members: the experts that it is made of.
        weights: of each, which sum to one.
        orders: for each, which of its neurons stands at each position [I].
    """

    experts: FusedExperts
    members: tuple[int, ...]
    weights: tuple[float, ...]
    orders: tuple[Tensor, ...]

    def gate_up_parts(self) -> list[Computed]:
        """Return its gate and up projection [2I, H], in blocks of rows."""
        _, rows, hidden = self.experts.gate_up.shape
        return [
            Computed((end - begin, hidden), self._gate_up_rows, (begin, end))
            for begin, end in row_blocks((rows, hidden))
        ]

    def down_parts(self) -> list[Computed]:
        """Return its down projection [H, I], in blocks of rows."""
        _, hidden, width = self.experts.down.shape
        return [
            Computed((end - begin, width), self._down_rows, (begin, end)) for begin, end in row_blocks((hidden, width))
        ]

    def _gate_up_rows(self, begin: int, end: int) -> Tensor:
        stored = self.experts.gate_up.load()
        orders = (torch.cat((order, order + self.experts.width))[begin:end] for order in self.orders)
        rows = (stored[member][order].double() for member, order in zip(self.members, orders, strict=True))
        return self._mean(rows)

    def _down_rows(self, begin: int, end: int) -> Tensor:
        stored = self.experts.down.load()
        return self._mean(
            stored[member, begin:end][:, order].double()
            for member, order in zip(self.members, self.orders, strict=True)
        )

    def _mean(self, matrices: Iterable[Tensor]) -> Tensor:
        return sum(weight * matrix for weight, matrix in zip(self.weights, matrices, strict=True))


def check_assignment() -> None:
    """Check that what finds the best order of neurons is installed.

    Raises:
        SettingsError: if not.
    """
    if importlib.util.find_spec("scipy") is None:
        raise SettingsError("method='merge' needs SciPy: pip install 'upcycled-moe[pruning]'; the others do not.")


def merged_expert(experts: FusedExperts, group: list[int], frequencies: Tensor) -> MergedExpert | None:
    """Return the mean of a `group` of experts, weighted by `frequencies` [E], with neurons as in the first of them.

    None if the others are never selected: then the first stays as it is.

    Source: M-SMoE (arXiv 2310.01334), its alignment and merging weights.
    """
    members = [group[0], *(expert for expert in group[1:] if frequencies[expert] > 0)]
    if len(members) == 1:
        return None
    weights = frequencies[members] / frequencies[members].sum()
    orders = [torch.arange(experts.width)]
    reference = experts.neurons(members[0])
    orders += [neuron_order(reference, experts.neurons(member)) for member in members[1:]]
    return MergedExpert(experts, tuple(members), tuple(weights.tolist()), tuple(orders))


def neuron_order(reference: list[Tensor], other: list[Tensor]) -> Tensor:
    """Return which neuron of `other` goes to each position [I], so that it lies nearest to `reference`.

    Both are lists of matrices [I, H], a row a neuron. The order minimises the squared distance of all their entries,
    or, what is the same, maximises their inner product: an assignment problem.

    Source: Git Re-Basin (arXiv 2209.04836), its weight matching, as in M-SMoE (arXiv 2310.01334); that gate, up and
    down projection count alike is ours.
    """
    # An extra that only this method needs.
    from scipy.optimize import linear_sum_assignment

    width = len(reference[0])
    # By what SciPy looks for as it is, the least: for the most it would copy the matrix.
    costs = torch.zeros(width, width, dtype=torch.double)
    for first, second in zip(reference, other, strict=True):
        second = second.float()
        for begin, end in row_blocks((width, max(first.shape))):
            costs[begin:end] -= first[begin:end].float() @ second.T
    return torch.from_numpy(linear_sum_assignment(costs.numpy())[1])
