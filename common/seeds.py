"""Seeds of random numbers that are drawn for different purposes and must not be alike."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """Return a seed below 2^32 that `parts` decide, such as the seed of a run, a purpose and a number.

    Two draws with one seed are not independent: a permutation that picks rows and one that orders them are the same.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])
