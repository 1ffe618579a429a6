"""Whole checkpoints as what weights are merged from: those of one model at several times, or trained on several data.

Dimensions: K checkpoints.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..checkpoint_source import CheckpointSource
from ..derived_checkpoint import DerivedCheckpoint, check_checkpoint_folder, written
from ..progress import Progress
from ..provenance import with_step, write_provenance
from ..settings import MAX_SHARD_SIZE, SettingsError, parse_size
from ..streaming.contents import Computed, Content, FileBytes, row_blocks
from ..streaming.planned import PlannedTensor, file_order, into_shards, layer_of
from ..streaming.stored import DTYPES, StoredTensor
from .coefficients import SoftmaxCoefficients
from .merge import BlendGroup
from .opening import check_alike, expected_tensors, open_checkpoint
from .sources import Blend, StoredSource


# Which weights have their coefficients in common.
SCOPES = ("model", "layer")
REST = "rest"
# How far from one the coefficients of a group may sum to: what numbers of seven digits do.
SUM_TOLERANCE = 1e-6
MAX_SHARD_BYTES = parse_size("max_shard_size", MAX_SHARD_SIZE)


@dataclass(frozen=True)
class CheckpointSeries:
    """Checkpoints of one architecture, of which one can be made: tensor by tensor `Σ_k c_k S_k`.

    Buffers are merged as parameters are. Configuration, tokenizer and what else lies beside the weights are those of
    the first one; a tensor has the type of the checkpoint that stores it most precisely.

    Args:
        sources: S_1 to S_K.
    """

    sources: tuple[CheckpointSource, ...]

    @cached_property
    def _is_parameter(self) -> dict[str, bool]:
        """By the name of each tensor; of tied embeddings the head is not one."""
        expected = expected_tensors(self.sources[0].config)
        return {name: isinstance(tensor, nn.Parameter) for name, tensor in expected.items()}

    def group_names(self, per: str) -> list[str]:
        """Return the names of the groups of weights.

        Args:
            per: `model`, all weights in one, or `layer`, those of each decoder layer and all others.
        """
        return list(dict.fromkeys(_group_of(name, per) for name in self._is_parameter))

    def groups(self, initial: Sequence[float], per: str = "model") -> list[BlendGroup]:
        """Return the weights in groups whose coefficients can be learned.

        Args:
            initial: shares [K] to start from, above zero.
            per: see [`group_names`].
        """
        _check_length("initial coefficients", initial, self)
        members: dict[str, list[Blend]] = {name: [] for name in self.group_names(per)}
        for name in self._is_parameter:
            if math.prod(self.sources[0].tensors[name].shape):
                sources = tuple(StoredSource(source.tensors[name]) for source in self.sources)
                members[_group_of(name, per)].append(Blend(name, sources))
        return [BlendGroup(name, SoftmaxCoefficients(initial), blends) for name, blends in members.items()]

    def derived(
        self, coefficients: Mapping[str, Sequence[float]], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> DerivedCheckpoint:
        """Return the checkpoint that the series merges into.

        Args:
            coefficients: [K] of each group by its name, as `LearnedMerge.values` returns them; `{"model": […]}` for
                all weights alike.
            max_shard_bytes: of a weight file.

        Raises:
            SettingsError: if the groups are others, or coefficients are not shares that sum to one.
        """
        per = "model" if set(coefficients) == {"model"} else "layer"
        _check_coefficients(coefficients, self, per)
        planned = [self._merged(name, tuple(coefficients[_group_of(name, per)])) for name in self._is_parameter]
        shards = into_shards(sorted(planned, key=file_order), max_shard_bytes)
        return DerivedCheckpoint(self.sources[0], self._config(), shards)

    def _config(self) -> PreTrainedConfig:
        config = copy.deepcopy(self.sources[0].config)
        dtypes = [source.config.dtype for source in self.sources if source.config.dtype is not None]
        if dtypes:
            config.dtype = reduce(torch.promote_types, dtypes)
        # Training sets it, so that a trained checkpoint has it and the one that it began with does not.
        if any(getattr(source.config, "router_dtype", None) == "float32" for source in self.sources):
            config.router_dtype = "float32"
        return config

    def _merged(self, name: str, coefficients: tuple[float, ...]) -> PlannedTensor:
        tensors = [source.tensors[name] for source in self.sources]
        total = math.fsum(coefficients)
        terms = tuple((c / total, tensor) for c, tensor in zip(coefficients, tensors, strict=True) if c > 0)
        dtype, shape = _widest([tensor.dtype for tensor in tensors]), tensors[0].shape
        return PlannedTensor(name, dtype, shape, _content(name, dtype, shape, terms), self._is_parameter[name])


def open_checkpoints(models: Sequence[str]) -> CheckpointSeries:
    """Read configurations and tensor headers of checkpoints of one architecture; no weight is read.

    Args:
        models: at least two local folders or Hub ids, of dense Qwen models or of this package's.

    Raises:
        SettingsError: if one cannot be read, or they are not of one architecture.
    """
    if len(models) < 2:
        raise SettingsError(f"{', '.join(models) or 'nothing'}: give two checkpoints or more to merge.")
    first, *others = sources = tuple(open_checkpoint(model) for model in models)
    for source in others:
        check_alike(first, source)
    return CheckpointSeries(sources)


def check_merged(series: CheckpointSeries, out: Path, overwrite: bool) -> None:
    """Check, before anything is learned, that what `series` merges into can be written to `out`.

    Raises:
        OutputError: if not.
    """
    share = 1 / len(series.sources)
    num_bytes = series.derived({"model": [share] * len(series.sources)}).num_bytes
    folders = {source.name: source.folder for source in series.sources}
    check_checkpoint_folder(out, num_bytes, folders, (), overwrite)


def write_merged(
    series: CheckpointSeries,
    coefficients: Mapping[str, Sequence[float]],
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Callable[[Path, Path], None] | None = None,
    **facts: Any,
) -> None:
    """Write what `series` merges into with `coefficients` to the folder `out`, all or nothing.

    Sums are in float64 and rounded once: where all sources are equal, or one coefficient is one, the result is theirs
    to the bit. One part of one tensor is in memory at a time.

    Args:
        coefficients: see [`CheckpointSeries.derived`].
        finish: called with the new folder and that of the first source before the new one is in place, such as
            `write_card`.
        facts: for provenance, which carries on that of the first source: how the coefficients came to be.

    Raises:
        SettingsError: if coefficients or `out` do not fit, or a weight is not finite; nothing is left then.
        OSError: if writing fails; nothing is left then.
    """
    derived = series.derived(coefficients, max_shard_bytes)
    check_merged(series, out, overwrite)
    with written(derived, out, overwrite, progress or Progress()) as folder:
        step = {
            "source": series.sources[0].record,
            "other_sources": [source.record for source in series.sources[1:]],
            "total_parameters": derived.total_parameters,
            "coefficients": {name: list(values) for name, values in coefficients.items()},
        }
        write_provenance(folder, with_step(series.sources[0].provenance, "merge", **step, **facts))
        if finish is not None:
            finish(folder, series.sources[0].folder)


def _group_of(name: str, per: str) -> str:
    if per not in SCOPES:
        raise SettingsError(f"per={per!r}: choose one of {', '.join(SCOPES)}.")
    if per == "model":
        return "model"
    layer_idx = layer_of(name)
    return REST if layer_idx is None else f"layer {layer_idx}"


def _check_coefficients(coefficients: Mapping[str, Sequence[float]], series: CheckpointSeries, per: str) -> None:
    names = series.group_names(per)
    if set(coefficients) != set(names):
        raise SettingsError(
            f"coefficients are of {', '.join(coefficients) or 'nothing'}; give them for 'model', or for each of "
            f"{', '.join(names)}."
        )
    for name, values in coefficients.items():
        _check_length(f"coefficients of {name}", values, series)
        if not all(0 <= value <= 1 for value in values) or abs(math.fsum(values) - 1) > SUM_TOLERANCE:
            raise SettingsError(f"coefficients of {name}: {list(values)} are no shares from 0 to 1 that sum to one.")


def _check_length(what: str, values: Sequence[float], series: CheckpointSeries) -> None:
    if len(values) != len(series.sources):
        raise SettingsError(f"{what}: {len(values)} numbers for {len(series.sources)} checkpoints; give one for each.")


def _widest(dtypes: Sequence[str]) -> str:
    dtype = reduce(torch.promote_types, (DTYPES[dtype] for dtype in dtypes))
    return next(name for name, value in DTYPES.items() if value == dtype)


def _content(name: str, dtype: str, shape: tuple[int, ...], terms: tuple[tuple[float, StoredTensor], ...]) -> Content:
    if len(terms) == 1 and terms[0][1].dtype == dtype:
        return FileBytes.whole(terms[0][1])
    if math.prod(shape) == 0:
        return ()
    num_rows, num_columns = math.prod(shape[:-1]), shape[-1]
    return tuple(
        Computed((end - begin, num_columns), _merged_rows, (name, dtype, terms, begin, end))
        for begin, end in row_blocks((num_rows, num_columns))
    )


def _merged_rows(name: str, dtype: str, terms: tuple[tuple[float, StoredTensor], ...], begin: int, end: int) -> Tensor:
    """Return rows of `Σ_k c_k S_k`, summed in float64 and rounded once.

    Products and sums are apart, as a fused one rounds otherwise at the edges of what a thread does.
    """
    total = None
    for coefficient, tensor in terms:
        part = StoredSource(tensor).rows(begin, end).double() * coefficient
        total = part if total is None else total.add_(part)
    merged = total.to(DTYPES[dtype])
    if not torch.isfinite(merged).all():
        raise SettingsError(f"{name}: the merged weights are not finite in {dtype}; look at the checkpoints.")
    return merged
