"""What a checkpoint will hold: every tensor, file and byte, settled before anything is written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .contents import Content
from .stored import DTYPES, StoredTensor


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the result; `content` is None for what is known only when it is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Content | None
    is_parameter: bool = True

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One weight file of the result."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def into_shards(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Return the weight files for `tensors` in their order; one is larger than the limit only if a tensor is."""
    groups: list[list[PlannedTensor]] = [[]]
    size_bytes = 0
    for tensor in tensors:
        if groups[-1] and size_bytes + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(tensor)
        size_bytes += tensor.num_bytes
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(tensors)),)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def num_parameters(shards: Sequence[Shard], has_tied_embeddings: bool) -> int:
    """Return the parameters in `shards`; a head that is stored although it is the embedding does not count."""
    return sum(
        math.prod(tensor.shape)
        for shard in shards
        for tensor in shard.tensors
        if tensor.is_parameter and not (has_tied_embeddings and tensor.name == "lm_head.weight")
    )


def layer_of(name: str) -> int | None:
    """Return the decoder layer of the tensor `name`, None if it is in none."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def file_order(tensor: PlannedTensor | StoredTensor) -> tuple:
    """Return a key to sort by.

    Embedding, layers in their order, final norm, heads; inside a layer the MLP's norm last, before the experts.
    """
    layer_idx = layer_of(tensor.name)
    if layer_idx is not None:
        return (1, layer_idx, tensor.name.endswith("post_attention_layernorm.weight"), tensor.name)
    return (0 if "embed_tokens" in tensor.name else 2, 0, False, tensor.name)
