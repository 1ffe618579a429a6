"""Best-of-n curves over one fixed table of samples: what gold pays for the response that a proxy likes best of n.

Dimensions: P prompts, N responses to each, C numbers of responses to choose from.
"""

import math
from collections.abc import Sequence

import numpy as np


def kl_upper_bound(n: int) -> float:
    """Return the most that choosing the best of `n` can move a policy, KL(best of n || policy), in nats.

    `log n − (n − 1) / n`. It was long taken for the divergence itself, which it is only where no two responses are the
    same.

    Source: Beirami et al., Theoretical guarantees on the best-of-n alignment policy (arXiv 2401.01879), Theorem 3.1.
    """
    return math.log(n) - (n - 1) / n


def numbers_to_choose_from(num_responses: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, 16 … up to and with `num_responses`: two points for each doubling."""
    powers = [2**power for power in range(num_responses.bit_length())]
    halfway = [3 * power // 2 for power in powers[1:]]
    return sorted({n for n in (*powers, *halfway) if n <= num_responses} | {num_responses})


def best_of_n_weights(num_responses: int, n: int) -> np.ndarray:
    """Return the probability [N] of each response, the worst first, to be the best of `n` drawn without replacement.

    `w_i = C(i − 1, n − 1) / C(N, n)` for the i-th worst of N.

    Raises:
        ValueError: if `n` is not in 1 … N.
    """
    if not 1 <= n <= num_responses:
        raise ValueError(f"n={n} is outside [1, {num_responses}].")
    weights = np.zeros(num_responses)
    # By the ratio of neighbours, (i − n) / (i − 1): the binomials themselves overflow.
    ranks = np.arange(num_responses, n, -1)
    weights[n - 1 :] = n / num_responses * np.cumprod(np.concatenate([[1.0], (ranks - n) / (ranks - 1)]))[::-1]
    return weights


def best_of_n(scores: np.ndarray, values: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Return the expected value [P, C] of the response with the highest score among n, for each n of `numbers`.

    Unbiased for n responses drawn anew from the policy, as each subset of n of the N responses is one such draw, and
    this is the mean over all of them. Among responses with the same score each is as likely to be chosen.

    Args:
        scores: of the proxy [P, N].
        values: what the chosen response is worth [P, N]: gold's scores, or the proxy's own.

    Source: WebGPT (arXiv 2112.09332), Appendix I, as Gao et al. (arXiv 2210.10760) use it. What ties do is our
    reading: neither speaks of them.
    """
    weights = np.stack([best_of_n_weights(scores.shape[1], n) for n in numbers], axis=1)  # [N, C]
    return np.stack([_in_order(*row) for row in zip(scores, values, strict=True)]) @ weights


def standardized(scores: np.ndarray) -> np.ndarray:
    """Return `scores` [P, N] less their mean for each prompt, in units of their standard deviation within prompts.

    Zero is then what the policy gets by itself, and scores of different models can be compared and joined. Pairs of
    responses to one prompt say nothing of a score's mean for that prompt, so that nothing may depend on it. The
    standard deviation is one for all prompts: √ of the mean square of what is left. Scores that are all the same for
    each prompt become zero.
    """
    centred = scores - scores.mean(axis=1, keepdims=True)
    deviation = centred.std()
    # Where all are the same but for the rounding of their mean, there is nothing to scale.
    is_constant = deviation <= 1e-12 * max(np.abs(scores).max(), 1e-300)
    return np.zeros_like(centred) if is_constant else centred / deviation


def _in_order(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return `values` [N] from the lowest score to the highest; of responses that tie, each gets their mean."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(group, weights=values) / sizes, sizes)
