"""Random numbers that depend on the seed and a name only: not on order, shards or threads."""

import hashlib

import torch


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """Return the generator of the tensor `name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
