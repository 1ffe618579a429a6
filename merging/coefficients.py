"""The coefficients of a merge: what each expert counts in each matrix, and the shared expert against all others.

Dimensions: E experts with weights.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import write_text
from ..common.settings import SettingsError, check_keys
from .layout import ExpertLayout


COEFFICIENTS_FORMAT = 1
_KEYS = frozenset({"format", "layers", "shared"})
# Of a file for whole checkpoints.
GROUP_KEYS = frozenset({"format", "groups"})
MATRICES = ("gate_proj", "up_proj", "down_proj")
# How far from one the coefficients of a matrix may sum to: what numbers of seven digits do.
SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class MergeCoefficients:
    """Coefficients of every MoE layer: `W = λ W_shared + (1 - λ) Σ_e c_e W_e`, with `Σ_e c_e = 1`.

    Args:
        layers: by decoder layer and matrix, the coefficients c [E] of the routed experts.
        shared: by decoder layer, the weight λ of the shared expert; None if there is none.
    """

    layers: Mapping[int, Mapping[str, tuple[float, ...]]]
    shared: Mapping[int, float] | None

    @classmethod
    def alike(
        cls, layers: Mapping[int, Sequence[float]], shared: Mapping[int, float] | None = None
    ) -> "MergeCoefficients":
        """Return coefficients that are the same for the three matrices of a layer."""
        return cls({layer: dict.fromkeys(MATRICES, tuple(values)) for layer, values in layers.items()}, shared)

    def to_dict(self) -> dict[str, Any]:
        """Return what a file of them holds; a layer is one list where its matrices have the same."""
        layers = {}
        for layer, matrices in self.layers.items():
            first, *others = matrices.values()
            is_alike = all(other == first for other in others)
            layers[str(layer)] = list(first) if is_alike else {name: list(matrices[name]) for name in MATRICES}
        result: dict[str, Any] = {"format": COEFFICIENTS_FORMAT, "layers": layers}
        if self.shared is not None:
            result["shared"] = {str(layer): weight for layer, weight in self.shared.items()}
        return result

    def save(self, path: Path) -> None:
        """Write them to `path`; what [`load_coefficients`] reads there is the same to the bit."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")


def average_coefficients(layout: ExpertLayout) -> MergeCoefficients:
    """Return coefficients for which all FFNs count alike, the shared expert as one of them."""
    routed = dict.fromkeys(layout.moe_layers, (1 / layout.num_experts,) * layout.num_experts)
    shared = dict.fromkeys(layout.moe_layers, 1 / (layout.num_copies + 1))
    return MergeCoefficients.alike(routed, shared if layout.has_shared_expert else None)


def shared_coefficients(layout: ExpertLayout) -> MergeCoefficients:
    """Return coefficients for which only the shared expert counts."""
    average = average_coefficients(layout)
    return MergeCoefficients(average.layers, dict.fromkeys(layout.moe_layers, 1.0))


def load_coefficients(
    path: Path, moe_layers: Sequence[int], num_experts: int, has_shared_expert: bool
) -> MergeCoefficients:
    """Return the coefficients in the JSON file `path`.

    Args:
        moe_layers: the layers that it must have, and no others.
        num_experts: E.
        has_shared_expert: whether it must have λ of each layer.

    Raises:
        SettingsError: if it cannot be read, or is not exactly that.
    """
    raw = read_object(path)
    check_keys(raw, _KEYS, str(path))
    layers = {
        layer: _matrices(values, num_experts, f"{path}: layer {layer}")
        for layer, values in _by_layer(raw.get("layers"), moe_layers, f"{path}: layers").items()
    }
    if not has_shared_expert:
        if "shared" in raw:
            raise SettingsError(f"{path}: has weights of a shared expert, and the model has none; leave 'shared' out.")
        return MergeCoefficients(layers, None)
    shared = _by_layer(raw.get("shared"), moe_layers, f"{path}: shared")
    return MergeCoefficients(
        layers, {layer: _share(value, f"{path}: shared of layer {layer}") for layer, value in shared.items()}
    )


def read_object(path: Path) -> dict[str, Any]:
    """Return what the file of coefficients `path` holds.

    Raises:
        SettingsError: if it cannot be read, is no JSON object, or is of another format.
    """
    raw = _read(path)
    if raw.get("format") != COEFFICIENTS_FORMAT:
        raise SettingsError(f"{path}: format is {raw.get('format')!r}; this version reads {COEFFICIENTS_FORMAT}.")
    return raw


def check_coefficients_file(path: Path) -> None:
    """Check that `path` is a file of coefficients, of whatever model, so that others may take its place.

    Raises:
        SettingsError: if it is not.
    """
    try:
        keys = _read(path).keys()
    except SettingsError:
        keys = set()
    if not ({"format", "layers"} <= keys <= _KEYS or keys == GROUP_KEYS):
        raise SettingsError(
            f"{path}: holds no coefficients, so --overwrite does not replace it; give --save-coefficients another "
            "file."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise SettingsError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(raw, dict):
        raise SettingsError(f"{path}: holds a {type(raw).__name__} instead of coefficients; see docs/merge.md.")
    return raw


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands in an object twice")
    return dict(pairs)


def _by_layer(values: Any, moe_layers: Sequence[int], where: str) -> dict[int, Any]:
    """Return `values` by the number of the layer, in the order of `moe_layers`."""
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: expected an object with an entry for each MoE layer; see docs/merge.md.")
    names = {str(layer): layer for layer in moe_layers}
    listed = ", ".join(names)
    if unknown := [name for name in values if name not in names]:
        raise SettingsError(f"{where}: {unknown[0]!r} is no MoE layer of the model; those are {listed}.")
    if missing := [name for name in names if name not in values]:
        raise SettingsError(f"{where}: layer {missing[0]} is missing; give one entry for each of {listed}.")
    return {layer: values[name] for name, layer in names.items()}


def _matrices(values: Any, num_experts: int, where: str) -> dict[str, tuple[float, ...]]:
    if not isinstance(values, dict):
        return dict.fromkeys(MATRICES, _coefficients(values, num_experts, where))
    check_keys(values, MATRICES, where)
    if missing := [name for name in MATRICES if name not in values]:
        raise SettingsError(f"{where}: {missing[0]} is missing; give all of {', '.join(MATRICES)}, or one list.")
    return {name: _coefficients(values[name], num_experts, f"{where}, {name}") for name in MATRICES}


def _coefficients(values: Any, num_experts: int, where: str) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != num_experts:
        given = f"has {len(values)} entries" if isinstance(values, list) else f"is {values!r}"
        raise SettingsError(f"{where}: {given}; give a list of {num_experts} numbers, one for each expert.")
    coefficients = tuple(_share(value, f"{where}, expert {expert}") for expert, value in enumerate(values))
    total = math.fsum(coefficients)
    if abs(total - 1) > SUM_TOLERANCE:
        raise SettingsError(f"{where}: the coefficients sum to {total:.9g}; scale them to sum to one.")
    return coefficients


def _share(value: Any, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise SettingsError(f"{where}: {value!r} is not a number from 0 to 1.")
    return float(value)
