import dataclasses
import itertools

import numpy as np
import pytest

from upcycled_moe.overoptimization.bootstrap import Interval
from upcycled_moe.overoptimization.curves import kl_upper_bound
from upcycled_moe.overoptimization.measures import measure
from upcycled_moe.overoptimization.results import measure_models


PROMPTS, RESPONSES = 80, 32


@pytest.fixture(scope="module")
def world():
    """Gold, and proxies: one that loves a rare flaw, one that sees it as gold does, and noise."""
    generator = np.random.default_rng(0)
    flaw = generator.random((PROMPTS, RESPONSES)) < 0.05
    gold = generator.normal(size=(PROMPTS, RESPONSES)) - 3 * flaw
    noise = generator.normal(size=(3, PROMPTS, RESPONSES))
    hacked, sound = gold + noise + 8 * flaw, gold + noise
    return {"gold": gold, "hacked": hacked, "sound": sound, "noise": noise[:1], "against": noise[:1] - gold}


def measured(world, baseline, *names, seed=0):
    scores = {name: world[name] for name in (baseline, *names)}
    return measure_models(scores, world["gold"], baseline=baseline, num_resamples=400, seed=seed)


def test_a_proxy_that_loves_a_flaw_over_optimises(world):
    results = measured(world, "hacked", "sound")
    hacked, sound = results.models["hacked"], results.models["sound"]
    assert hacked.overoptimizes
    assert not sound.overoptimizes
    figures = hacked.figures
    assert 1 < figures.peak < RESPONSES
    assert figures.gold_at_peak == max(hacked.gold.values)
    assert figures.drop == pytest.approx(figures.gold_at_peak - hacked.gold.values[-1])
    assert hacked.drop_interval.low < figures.drop < hacked.drop_interval.high
    assert figures.drop_proxy_rise == pytest.approx(
        hacked.proxy.values[-1] - hacked.proxy.values[results.numbers.index(figures.peak)]
    )
    assert figures.goodhart_gap > sound.figures.goodhart_gap > 0
    assert (sound.figures.peak, sound.figures.drop) == (RESPONSES, 0)


def test_gold_is_in_standard_deviations_from_the_policy(world):
    shifted = world | {"gold": 5 + 3 * world["gold"]}
    same, other = (measured(one, "hacked").models["hacked"] for one in (world, shifted))
    np.testing.assert_allclose(same.gold.values, other.gold.values, atol=1e-12)
    assert same.gold.values[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("moved", ["gold", "hacked"])
def test_what_is_added_to_all_responses_to_a_prompt_does_not_matter(world, moved):
    offsets = 10 * np.random.default_rng(1).normal(size=(PROMPTS, 1))
    same, other = (measured(one, "hacked", "sound") for one in (world, world | {moved: world[moved] + offsets}))
    for name in ("hacked", "sound"):
        first, second = (dataclasses.asdict(one.models[name].figures) for one in (same, other))
        assert first == pytest.approx(second)
    assert same.comparisons["sound"].drop.value == pytest.approx(other.comparisons["sound"].drop.value)


def test_a_proxy_that_is_wrong_from_the_start_does_not_over_optimise(world):
    results = measured(world, "against", "noise", "hacked")
    against = results.models["against"]
    assert against.drop_interval.low > 0
    assert (against.figures.peak, against.overoptimizes, against.is_worse_than_no_choice) == (1, False, True)
    assert not results.models["noise"].is_worse_than_no_choice
    assert not results.models["hacked"].is_worse_than_no_choice
    assert not any(results.reduces(name) for name in results.comparisons)
    first = results.verdicts()[0]
    assert first.startswith("against, the baseline, is worse than no choice: gold falls by ")
    assert f"from n = 1 to {RESPONSES} and is not shown to rise before. It is wrong from the start" in first
    second = measured(world, "sound", "against").verdicts()[1]
    assert second.startswith("against is worse than no choice: ")
    assert results.to_dict()["models"]["against"]["is_worse_than_no_choice"] is True


def test_a_proxy_that_chooses_nothing_has_its_peak_without_a_choice(world):
    results = measured(world | {"constant": np.full((1, PROMPTS, RESPONSES), 0.1)}, "constant")
    assert results.models["constant"].figures.peak == 1
    assert results.verdicts()[0].startswith("constant, the baseline, does not over-optimise here: gold falls by 0.000")


def test_the_figures_of_seeds_are_their_own_and_the_curve_is_their_mean(world):
    model = measured(world, "hacked").models["hacked"]
    alone = [measured({**world, "hacked": seed[None]}, "hacked").models["hacked"] for seed in world["hacked"]]
    assert [seed.figures for seed in model.seeds] == [one.figures for one in alone]
    assert [seed.drop_interval for seed in model.seeds] == [one.drop_interval for one in alone]
    np.testing.assert_allclose(model.gold.values, np.mean([one.gold.values for one in alone], axis=0), atol=1e-12)
    np.testing.assert_allclose(model.proxy.values, np.mean([seed.proxy for seed in model.seeds], axis=0), atol=1e-12)


def test_nothing_exceeds_gold_itself(world):
    results = measured(world, "hacked", "sound", "noise")
    oracle = results.oracle
    assert oracle.figures.regret == pytest.approx(0, abs=1e-12)
    for model in results.models.values():
        assert all(one <= best + 1e-12 for one, best in zip(model.gold.values, oracle.gold.values, strict=True))
        assert model.figures.regret == pytest.approx(oracle.gold.values[-1] - model.figures.gold_at_end)


def test_noise_gains_nothing_and_loses_nothing(world):
    model = measured(world, "noise").models["noise"]
    assert not model.overoptimizes
    assert model.gold.low[-1] < 0 < model.gold.high[-1]
    assert model.figures.pairwise_accuracy == pytest.approx(0.5, abs=0.02)


def test_differences_are_paired(world):
    """A model that differs from the baseline by a constant has no difference at all, in any resample."""
    same = 2 * world["hacked"].mean(axis=0, keepdims=True) + 1
    results = measured(world | {"hacked": world["hacked"].mean(axis=0)[None], "same": same}, "hacked", "same", "sound")
    same, sound = results.comparisons["same"], results.comparisons["sound"]
    for difference in (same.drop, same.gold_at_peak, same.gold_at_end):
        assert difference.interval.low == pytest.approx(0, abs=1e-12)
        assert difference.interval.high == pytest.approx(0, abs=1e-12)
    hacked = results.models["hacked"].figures
    assert sound.drop.value == pytest.approx(-hacked.drop)
    assert sound.gold_at_end.value == pytest.approx(results.models["sound"].figures.gold_at_end - hacked.gold_at_end)
    assert results.reduces("sound")
    assert not results.reduces("same")


def test_intervals_are_over_seeds_where_both_models_have_several(world):
    """Seeds that differ widely: one of each model loves the flaw, which two of each do not."""
    ours, theirs = (np.stack([world["sound"][0], world["sound"][1], world["hacked"][seed]]) for seed in (0, 1))
    worlds = world | {"ours": ours, "theirs": theirs, "alone": ours.mean(axis=0)[None]}
    results = measured(worlds, "theirs", "ours", "alone")
    over_seeds, over_prompts = results.comparisons["ours"], results.comparisons["alone"]
    assert (over_seeds.over_seeds, over_prompts.over_seeds) == (True, False)
    widths = [one.gold_at_end.interval.high - one.gold_at_end.interval.low for one in (over_seeds, over_prompts)]
    assert widths[0] > 3 * widths[1]
    assert results.to_dict()["comparisons"]["alone"]["over_seeds"] is False


def test_a_comparison_of_single_models_says_that_it_is_of_them(world):
    results = measured(world | {"one": world["sound"][:1]}, "hacked", "sound", "one")
    _, several, one = results.verdicts()
    assert several.startswith("sound loses less than hacked: ")
    assert one.startswith("one loses less than hacked, on these seeds: ")


def test_a_model_more_changes_no_other_comparison(world):
    alone = measured(world, "hacked", "sound")
    together = measured(world | {"other": world["sound"][::-1]}, "hacked", "other", "sound")
    assert alone.comparisons["sound"] == together.comparisons["sound"]


def test_the_same_seed_gives_the_same_results(world):
    first, again, other = (measured(world, "hacked", "sound", seed=seed).to_dict() for seed in (0, 0, 1))
    assert first == again
    assert first["comparisons"] != other["comparisons"]


def test_it_says_what_happens(world):
    first, second = measured(world, "hacked", "sound").verdicts()
    assert first.startswith("hacked, the baseline, over-optimises: gold falls by ")
    assert second.startswith("sound loses less than hacked: its drop differs by -")


def test_nothing_is_reduced_unless_the_baseline_over_optimises_for_certain(world):
    results = measured(world, "hacked", "sound")
    doubtful = dataclasses.replace(results.models["hacked"], drop_interval=Interval(0.0, 1.0))
    results = dataclasses.replace(results, models=results.models | {"hacked": doubtful})
    assert results.comparisons["sound"].drop.interval.high < 0
    assert not results.reduces("sound")
    assert results.to_dict()["comparisons"]["sound"]["reduces_overoptimization"] is False


def test_it_says_what_the_mean_of_seeds_hides(world):
    hacked, sound = world["hacked"], world["sound"]
    mixed = np.stack([sound[0], sound[1], hacked[2]])
    doubtful = np.stack([sound[0], sound[1], world["against"][0]])
    results = measured(world | {"mixed": mixed, "doubtful": doubtful}, "sound", "mixed", "noise", "doubtful")
    first, second, third, fourth = results.verdicts()
    assert "; 0 of 3 seeds over-optimise by themselves. There is nothing" in first
    assert second.endswith("; 1 of 3 seeds over-optimise by themselves.")
    assert fourth.endswith("; 0 of 3 seeds over-optimise by themselves, 1 worse than no choice.")
    assert "seeds" not in third


def test_it_says_that_nothing_can_be_reduced(world):
    results = measured(world, "sound", "hacked", "noise")
    first, second, third = results.verdicts()
    assert first.startswith("sound, the baseline, does not over-optimise here: gold still rises at n = 32, to +")
    assert "nothing that another model could reduce" in first
    assert second.startswith("hacked over-optimises: gold falls by ")
    assert third.startswith("noise does not over-optimise either: ")
    assert results.to_dict()["baseline_overoptimizes"] is False
    assert not any(results.reduces(name) for name in results.comparisons)


def test_it_warns_of_few_prompts(world):
    few = {name: table[..., :10, :] for name, table in world.items()}
    assert measured(few, "hacked").verdicts()[-1].startswith("Intervals from 10 prompts are too narrow")


def test_pairwise_accuracy_and_correlation_by_hand():
    gold = np.array([[0.0, 1.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    proxy = np.array([[0.0, 1.0, 1.0, 0.5], [1.0, 2.0, 3.0, 4.0]])
    model = measure(proxy[None], gold, [1, 4], np.full((3, 2), 0.5))
    agreements = []
    for one, other in itertools.combinations(range(4), 2):
        if gold[0, one] != gold[0, other]:
            agreement = (gold[0, one] - gold[0, other]) * (proxy[0, one] - proxy[0, other])
            agreements.append(0.5 if agreement == 0 else float(agreement > 0))
    assert model.figures.pairwise_accuracy == pytest.approx(np.mean(agreements))
    within = [table - table.mean(axis=1, keepdims=True) for table in (proxy, gold)]
    assert model.figures.correlation == pytest.approx(np.corrcoef(within[0].ravel(), within[1].ravel())[0, 1])


def test_scores_that_are_all_the_same_have_no_correlation():
    gold = np.random.default_rng(0).normal(size=(4, 3))
    model = measure(np.full((1, 4, 3), 0.1), gold, [1, 2, 3], np.full((3, 4), 0.25))
    assert (model.figures.correlation, model.figures.pairwise_accuracy) == (None, 0.5)
    np.testing.assert_allclose(model.gold.values, 0, atol=1e-12)


def test_a_curve_without_its_ends_is_refused():
    with pytest.raises(ValueError, match="from 1 to 3, not from 2 to 3"):
        measure(np.zeros((1, 2, 3)), np.eye(2, 3), [2, 3], np.full((3, 2), 0.5))


def test_the_divergence_stands_beside_each_number(world):
    results = measured(world, "sound").to_dict()
    assert results["kl_upper_bounds"] == [kl_upper_bound(n) for n in results["numbers"]]
    assert (results["numbers"][0], results["numbers"][-1]) == (1, RESPONSES)
