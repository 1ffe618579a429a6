"""A layer whose routing has collapsed is named, once, and only if the figures can tell."""

import math

import pytest

from upcycled_moe.train.monitoring.collapse import CollapseWatch, evenness


NUM_EXPERTS, TOP_K, MANY_TOKENS = 16, 2, 100_000


def _metrics(load):
    return {
        "load": load,
        "load_entropy": -sum(share * math.log(share) for share in load if share),
        "experts_per_token": float(TOP_K),
        "dead_experts": load.count(0.0),
    }


BALANCED = _metrics([1 / NUM_EXPERTS] * NUM_EXPERTS)
# Nearly all tokens to two experts, the others get some still.
TWO_EXPERTS = _metrics([0.47, 0.46] + [0.07 / 14] * 14)
HALF_DEAD = _metrics([0.0] * 8 + [0.125] * 8)
UNEVEN = _metrics([0.2] + [0.8 / 15] * 15)


def _lines(watch, *layers, num_tokens=MANY_TOKENS, first=1):
    """Return what is said at each of the logs of one layer."""
    return [list(watch.observe(step, num_tokens, {3: layer})) for step, layer in enumerate(layers, first)]


@pytest.mark.parametrize("collapsed", [TWO_EXPERTS, HALF_DEAD])
def test_a_collapsed_layer_is_told_once_and_again_when_it_recovers(collapsed):
    said = _lines(CollapseWatch(0.3), BALANCED, collapsed, collapsed, collapsed, BALANCED, BALANCED, BALANCED)
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0, 1, 0]
    assert "step 3: routing has collapsed in layer 3" in said[2][0]
    assert said[5] == ["step 6: routing has recovered in layer 3."]


def test_the_warning_names_the_busiest_expert_and_what_to_do():
    (line,) = _lines(CollapseWatch(0.3), TWO_EXPERTS, TWO_EXPERTS)[1]
    assert "layer 3: expert 0 gets 47% of the selections, 6.2% if balanced, 0 of 16 experts get none" in line
    assert "router_aux_loss_coef" in line


def test_all_layers_are_named_and_a_few_described():
    watch = CollapseWatch(0.3)
    layers = dict.fromkeys(range(10), TWO_EXPERTS)
    assert not list(watch.observe(1, MANY_TOKENS, layers))
    (line,) = watch.observe(2, MANY_TOKENS, layers)
    assert "layers 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 (" in line
    assert line.count("of the selections") == 3


@pytest.mark.parametrize("layer", [BALANCED, UNEVEN])
def test_uneven_is_not_collapsed(layer):
    assert not any(_lines(CollapseWatch(0.3), *[layer] * 5))


def test_a_single_log_is_no_reason():
    assert not any(_lines(CollapseWatch(0.3), TWO_EXPERTS, BALANCED, TWO_EXPERTS, BALANCED))


def test_the_first_steps_tell_nothing():
    assert not any(_lines(CollapseWatch(0.3, first_step=5), *[TWO_EXPERTS] * 6))


@pytest.mark.parametrize("collapsed", [TWO_EXPERTS, HALF_DEAD])
def test_logs_of_few_tokens_are_judged_together(collapsed):
    """100 selections an expert are enough, and two such judgements."""
    num_tokens = 100 * NUM_EXPERTS // TOP_K // 4
    said = _lines(CollapseWatch(0.3), *[collapsed] * 12, *[BALANCED] * 12, num_tokens=num_tokens)
    assert [step for step, lines in enumerate(said, 1) if lines] == [8, 20]
    assert "expert 0 gets 47%" in said[7][0] or "8 of 16 experts get none" in said[7][0]
    assert not any(_lines(CollapseWatch(0.3), *[collapsed] * 9, num_tokens=num_tokens - 1))


def test_logs_that_leave_out_other_experts_in_turn_are_balanced_together():
    """As chance does it where a log has few tokens."""
    halves = [_metrics([0.0] * 8 + [0.125] * 8), _metrics([0.125] * 8 + [0.0] * 8)]
    num_tokens = 100 * NUM_EXPERTS // TOP_K // 2
    assert not any(_lines(CollapseWatch(0.3), *halves * 10, num_tokens=num_tokens))


def test_figures_that_are_no_numbers_tell_nothing():
    broken = {**TWO_EXPERTS, "load_entropy": math.nan}
    said = _lines(CollapseWatch(0.3), broken, TWO_EXPERTS, broken, TWO_EXPERTS)
    assert [len(lines) for lines in said] == [0, 0, 0, 1]


def test_evenness_runs_from_the_worst_that_is_possible_to_balance():
    assert evenness(math.log(TOP_K), TOP_K, NUM_EXPERTS) == pytest.approx(0)
    assert evenness(math.log(NUM_EXPERTS), TOP_K, NUM_EXPERTS) == pytest.approx(1)
    assert evenness(math.log(4), 4, 4) == 1
