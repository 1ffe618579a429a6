"""Ensembles of reward models: one score of several.

Dimensions: M members, P prompts, N responses to each.
"""

from collections.abc import Callable

import numpy as np

from .curves import standardized


def ensemble_mean(members: np.ndarray) -> np.ndarray:
    """Return the mean [P, N] of the members' scores [M, P, N]."""
    return members.mean(axis=0)


def ensemble_min(members: np.ndarray) -> np.ndarray:
    """Return the lowest [P, N] of the members' scores [M, P, N]: a response must please them all."""
    return members.min(axis=0)


_JOINED: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mean": ensemble_mean, "min": ensemble_min}


def join_scores(members: np.ndarray, method: str) -> np.ndarray:
    """Return the score [P, N] of the ensemble of members with the scores [M, P, N], by a `method` of ENSEMBLE_METHODS.

    Members are standardised within prompts first: Bradley-Terry training fixes neither the scale of a score nor its
    zero, which may be another for each prompt. The mean would follow the member with the largest scale, the lowest
    score the one with the lowest zero.

    Source: Coste et al., Reward model ensembles help mitigate overoptimization (arXiv 2310.02743): mean and worst-case
    optimisation. That members are standardised, and within prompts, is our reading.
    """
    return _JOINED[method](np.stack([standardized(member) for member in members]))
