import itertools
import math

import numpy as np
import pytest

from upcycled_moe.overoptimization.curves import (
    best_of_n,
    best_of_n_weights,
    kl_upper_bound,
    numbers_to_choose_from,
    standardized,
)


def brute_force(scores, values, n):
    """The mean over all subsets of n responses of the value of the best, or of the mean value of those that tie."""
    chosen = []
    for subset in itertools.combinations(range(len(scores)), n):
        best = max(scores[index] for index in subset)
        chosen.append(np.mean([values[index] for index in subset if scores[index] == best]))
    return np.mean(chosen)


def exact_kl(probabilities, n):
    """KL(best of n || policy) of a policy over responses in the order of their scores."""
    below = np.concatenate([[0], np.cumsum(probabilities)])
    best = below[1:] ** n - below[:-1] ** n
    return float(np.sum(best * np.log(best / probabilities)))


@pytest.mark.parametrize("ties", [False, True])
def test_the_estimator_is_the_mean_over_all_subsets(ties):
    generator = np.random.default_rng(0)
    scores, values = generator.normal(size=(3, 7)), generator.normal(size=(3, 7))
    if ties:
        scores = np.round(scores)
        assert all(len(set(row)) < 7 for row in scores)
    estimated = best_of_n(scores, values, range(1, 8))
    for prompt, n in itertools.product(range(3), range(1, 8)):
        assert estimated[prompt, n - 1] == pytest.approx(brute_force(scores[prompt], values[prompt], n), abs=1e-12)


def test_it_is_unbiased_for_fresh_draws():
    """The best of 3 of a standard normal has the mean 3 / (2 √π), which the estimator finds from tables of 12."""
    scores = np.random.default_rng(0).normal(size=(10_000, 12))
    assert best_of_n(scores, scores, [3]).mean() == pytest.approx(1.5 / math.sqrt(math.pi), abs=0.015)


def test_the_weights_are_probabilities_of_the_binomials():
    for num_responses, n in itertools.product((1, 2, 9), (1, 2, 5, 9)):
        if n <= num_responses:
            exact = [math.comb(i - 1, n - 1) / math.comb(num_responses, n) for i in range(1, num_responses + 1)]
            np.testing.assert_allclose(best_of_n_weights(num_responses, n), exact, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 7, 5000, 10_000])
def test_the_weights_of_a_large_table_do_not_overflow(n):
    weights = best_of_n_weights(10_000, n)
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert weights[-1] == n / 10_000


@pytest.mark.parametrize("n", [0, 5])
def test_more_than_there_are_cannot_be_drawn(n):
    with pytest.raises(ValueError, match=rf"n={n} is outside \[1, 4\]"):
        best_of_n_weights(4, n)


@pytest.mark.parametrize(("n", "bound"), [(1, 0.0), (2, 0.193147), (16, 1.835089), (64, 3.174508)])
def test_the_kl_bound(n, bound):
    assert kl_upper_bound(n) == pytest.approx(bound, abs=1e-6)


def test_the_bound_is_above_the_divergence_and_near_it_for_many_responses():
    few, many = np.full(4, 1 / 4), np.full(100_000, 1 / 100_000)
    assert exact_kl(few, 16) < 0.8 * kl_upper_bound(16)
    assert kl_upper_bound(16) - 1e-3 < exact_kl(many, 16) < kl_upper_bound(16)


@pytest.mark.parametrize(
    ("num_responses", "numbers"), [(2, [1, 2]), (5, [1, 2, 3, 4, 5]), (16, [1, 2, 3, 4, 6, 8, 12, 16])]
)
def test_the_points_of_a_curve(num_responses, numbers):
    assert numbers_to_choose_from(num_responses) == numbers


def test_scores_are_standardized_within_prompts():
    scores = standardized(np.array([[1.0, 2.0], [3.0, 6.0]]))
    np.testing.assert_allclose(scores, np.array([[-0.5, 0.5], [-1.5, 1.5]]) / math.sqrt(1.25))


def test_scores_that_are_all_the_same_for_each_prompt_say_nothing():
    assert not standardized(np.repeat([[0.1], [0.7], [1e6]], 7, axis=1)).any()
