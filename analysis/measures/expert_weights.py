"""How alike the weights of experts are, and how far they have moved from the dense parent that they were copied from.

Dimensions: L MoE layers, C experts with weights of their own, H hidden size, I intermediate size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ...common.moe_layers import MoeLayer
from ...common.settings import SettingsError
from ..parent import MATRICES, DenseParent
from ..results import Figure, MeasureResult
from .domain_means import numbers
from .measure import Measure
from .pairs import cosines, mean_of_pairs


# Weights that are held in double precision at a time, over experts.
CHUNK_WEIGHTS = 2**22


@dataclass(frozen=True, eq=False)
class _LayerProducts:
    """Scalar products of the weights of each two experts of a layer, over all entries.

    Args:
        weights: by matrix [C, C].
        updates: of what was added to the parent's weights [C, C]; None without a parent of this shape.
        parent: of the parent's weights with themselves.
    """

    weights: dict[str, torch.Tensor]
    updates: torch.Tensor | None
    parent: float


class ExpertWeights(Measure):
    """The cosine similarity of the weights of two experts, and the distance of each from the dense parent.

    The matrices of an expert count as one vector. The parent is rounded to the type of the experts' weights, so that
    copies differ by nothing. Experts without computation have no part in it.

    Tables: `similarity` [L][C][C]; `similarity_of_matrices`, the mean over pairs of `gate`, `up` and `down` [L] each;
    `divergence` [L][C] and `update_similarity` [L][C][C] against the parent, None where it has no such layer, and for
    pairs with an expert that did not move.
    """

    name = "expert_weights"
    figures = (
        Figure(
            name="expert_weight_similarity",
            title="Cosine similarity of expert weights",
            formula="mean_{i<j} ⟨W_i, W_j⟩ / (‖W_i‖_F ‖W_j‖_F)",
            meaning=(
                "1 for copies; near 0 for experts that were trained from different random numbers, even if they "
                "compute alike, for their neurons are in different orders."
            ),
            source="ours",
        ),
        Figure(
            name="parent_divergence",
            title="Divergence from the parent",
            formula="mean_e ‖W_e − W_0‖_F / ‖W_0‖_F",
            meaning="How far training has moved the experts from the dense network: 0 for copies.",
            source="ours",
        ),
        Figure(
            name="parent_update_similarity",
            title="Cosine similarity of the experts' updates",
            formula="mean_{i<j} ⟨W_i − W_0, W_j − W_0⟩ / (‖W_i − W_0‖_F ‖W_j − W_0‖_F)",
            meaning=(
                "Whether experts move in the same direction: 1 if training changes all alike, so that they stay one "
                "dense network; near 0 if each learns something of its own. Upcycled experts are alike because of "
                "their parent, and this leaves it out."
            ),
            source="ours; W − W_0 is the task vector of Ilharco et al. (arXiv 2212.04089)",
        ),
    )

    @torch.no_grad()
    def result(self) -> MeasureResult:
        products, notes = self._products()
        similarity = torch.stack([cosines(sum(layer.weights.values())) for layer in products])  # [L, C, C]
        of_matrices = {
            matrix: numbers(torch.stack([mean_of_pairs(cosines(layer.weights[matrix])) for layer in products]))
            for matrix in MATRICES
        }
        divergence, update_similarity = _against_parent(products, similarity.shape[-1])
        return MeasureResult(
            per_layer={
                "expert_weight_similarity": numbers(mean_of_pairs(similarity)),
                "parent_divergence": numbers(divergence.mean(dim=-1)),
                "parent_update_similarity": numbers(mean_of_pairs(update_similarity)),
            },
            tables={
                "similarity": numbers(similarity),
                "similarity_of_matrices": of_matrices,
                "divergence": numbers(divergence),
                "update_similarity": numbers(update_similarity),
            },
            notes=notes,
        )

    def _products(self) -> tuple[list[_LayerProducts], list[str]]:
        """Return the products of each layer [L], and what the reader should know about the parent."""
        layers, notes = self.subject.layers, []
        if self.subject.parent is None:
            return _of_layers(layers), ["No dense parent is compared with: there is no divergence from it."]
        try:
            parent = DenseParent(self.subject.parent)
            products = _of_layers(layers, parent)
        except SettingsError as error:
            return _of_layers(layers), [f"There is no divergence from the parent. {error}"]
        if any(layer.updates is None for layer in products):
            notes.append(
                f"{parent.name} has no feed-forward networks of the experts' shape in some layers, as if experts are "
                "slices of it: there is no divergence from it there."
            )
        if any(layer.updates is not None and not layer.parent for layer in products):
            notes.append(
                f"The feed-forward networks of {parent.name} are zero in some layers: there is no divergence there."
            )
        return products, notes


def _of_layers(layers: Sequence[MoeLayer], parent: DenseParent | None = None) -> list[_LayerProducts]:
    return [_layer_products(layer, parent) for layer in layers]


def fits_parent(layer: MoeLayer, parent: DenseParent) -> bool:
    """Return whether `parent` has a feed-forward network that the experts of `layer` can be compared with."""
    return parent.fits(layer.index, {name: weight.shape[1:] for name, weight in _matrices(layer).items()})


def _against_parent(products: list[_LayerProducts], num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence [L, C] and the similarity of updates [L, C, C]; NaN without a parent."""
    divergence = torch.full((len(products), num_experts), math.nan, dtype=torch.float64)
    similarity = torch.full((len(products), num_experts, num_experts), math.nan, dtype=torch.float64)
    for at, layer in enumerate(products):
        if layer.updates is not None:
            if layer.parent:
                divergence[at] = layer.updates.diagonal().sqrt() / math.sqrt(layer.parent)
            similarity[at] = cosines(layer.updates)
    return divergence, similarity


def _layer_products(layer: MoeLayer, parent: DenseParent | None) -> _LayerProducts:
    weights = _matrices(layer)
    updates, parent_square = None, 0.0
    if parent is not None and fits_parent(layer, parent):
        tensors = parent.feed_forward(layer.index)
        origin = {name: tensors[name].to(weights[name]) for name in MATRICES}
        updates = sum(_products(weights[name], origin[name]) for name in MATRICES)
        parent_square = sum(origin[name].double().square().sum().item() for name in MATRICES)
    return _LayerProducts({name: _products(weights[name]) for name in MATRICES}, updates, parent_square)


def _matrices(layer: MoeLayer) -> dict[str, torch.Tensor]:
    """Return `gate` [C, I, H], `up` [C, I, H] and `down` [C, H, I]."""
    gate, up = layer.experts.gate_up_proj.chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": layer.experts.down_proj}


def _products(weights: torch.Tensor, origin: torch.Tensor | None = None) -> torch.Tensor:
    """Return the scalar products [C, C] of `weights` [C, rows, columns], less `origin` [rows, columns] if it is given.

    In double precision where there is one: updates are small beside the weights.
    """
    num_experts, _, num_columns = weights.shape
    dtype = sum_dtype(weights.device)
    products = torch.zeros(num_experts, num_experts, dtype=dtype, device=weights.device)
    num_rows = max(CHUNK_WEIGHTS // (num_experts * num_columns), 1)
    for at, chunk in enumerate(weights.split(num_rows, dim=1)):
        chunk = chunk.to(dtype)
        if origin is not None:
            chunk = chunk - origin[at * num_rows : (at + 1) * num_rows].to(dtype)
        flat = chunk.flatten(1)
        products += flat @ flat.T
    return products.cpu().double()
