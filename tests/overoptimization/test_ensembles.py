import numpy as np
import pytest

from upcycled_moe.overoptimization.curves import standardized
from upcycled_moe.overoptimization.ensembles import join_scores
from upcycled_moe.overoptimization.settings import ENSEMBLE_METHODS


MEMBERS = np.random.default_rng(0).normal(size=(3, 4, 5))


@pytest.mark.parametrize("method", ENSEMBLE_METHODS)
def test_each_response_gets_the_mean_or_the_lowest_of_standardised_scores(method):
    joined = join_scores(MEMBERS, method)
    for place in np.ndindex(4, 5):
        centred = [member - member.mean(axis=1, keepdims=True) for member in MEMBERS]
        scores = [member[place] / np.sqrt(np.mean(member**2)) for member in centred]
        assert joined[place] == pytest.approx(sum(scores) / 3 if method == "mean" else min(scores))


@pytest.mark.parametrize("method", ENSEMBLE_METHODS)
def test_zero_and_scale_of_a_member_do_not_matter(method):
    moved = MEMBERS * np.array([1, 10, 0.1])[:, None, None] + np.array([0, -50, 3])[:, None, None]
    np.testing.assert_allclose(join_scores(moved, method), join_scores(MEMBERS, method), atol=1e-12)


@pytest.mark.parametrize("method", ENSEMBLE_METHODS)
def test_what_a_member_adds_to_all_responses_to_a_prompt_does_not_matter(method):
    """Pairs of responses to one prompt leave it free."""
    moved = MEMBERS + 100 * np.random.default_rng(1).normal(size=(3, 4, 1))
    np.testing.assert_allclose(join_scores(moved, method), join_scores(MEMBERS, method), atol=1e-9)


def test_an_ensemble_of_a_model_with_itself_is_that_model():
    for method in ENSEMBLE_METHODS:
        twice = join_scores(np.stack([MEMBERS[0], MEMBERS[0]]), method)
        np.testing.assert_allclose(twice, standardized(MEMBERS[0]))
