"""Random numbers that depend on the seed and a name only: not on order, shards or threads."""

import hashlib

import torch


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """Return the generator of the tensor `name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def drawn_tensor(shape: tuple[int, ...], std: float, seed: int, name: str) -> torch.Tensor:
    """Return a tensor drawn from N(0, std) by the generator of `name`."""
    return torch.empty(shape).normal_(0.0, std, generator=tensor_generator(seed, name))
