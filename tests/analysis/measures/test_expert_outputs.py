"""The similarity of expert outputs, by hand and against every expert run by itself on every token."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from moe_checkpoints import make_model
from routed_blocks import block_of, routed_blocks

from upcycled_moe.analysis.measures import Subject, expert_outputs
from upcycled_moe.analysis.measures.expert_outputs import ExpertOutputs, spaced_positions
from upcycled_moe.common.moe_layers import find_moe_layers


@pytest.fixture
def all_tokens(monkeypatch):
    """Let the measure take all tokens."""
    monkeypatch.setattr(expert_outputs, "TOKENS_PER_BLOCK", 10**6)
    monkeypatch.setattr(expert_outputs, "MAX_TOKENS", 10**6)


def _subject(layers, num_domains=1):
    return Subject(layers, [f"domain{domain}" for domain in range(num_domains)], torch.device("cpu"))


def _layer(*experts):
    """A layer whose experts are these functions of tokens [T, H]."""
    return SimpleNamespace(
        num_computed_experts=len(experts), expert_outputs=lambda tokens: (expert(tokens) for expert in experts)
    )


def _tokens(hidden_states, num_blocks=1, domain=0):
    """Tokens [T, H] in blocks; what was selected has no part in this measure."""
    selected = torch.zeros(num_blocks, len(hidden_states) // num_blocks, 1, dtype=torch.long)
    return routed_blocks(selected, 1, domain=domain, hidden_states=hidden_states)


def _measured(subject, *batches):
    measure = ExpertOutputs(subject)
    for batch in batches:
        measure.update(0, batch)
    return measure.result()


def _of_model(kind, hidden_size=32, dtype=torch.float32):
    layer = find_moe_layers(make_model(kind).to(dtype))[0]
    hidden_states = torch.randn(12, hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return layer, hidden_states


def _naive(layer, hidden_states):
    """Cosines [C][C] and the spread, from each expert's weights and each token."""
    gate_up, down = layer.experts.gate_up_proj.double(), layer.experts.down_proj.double()
    num_experts, width = len(gate_up), gate_up.shape[1] // 2
    cosines = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    spread = 0.0
    for token in hidden_states.double():
        outputs = []
        for expert in range(num_experts):
            hidden = gate_up[expert] @ token
            outputs.append(down[expert] @ (torch.nn.functional.silu(hidden[:width]) * hidden[width:]))
        for first, second in itertools.product(range(num_experts), repeat=2):
            cosines[first, second] += torch.cosine_similarity(outputs[first], outputs[second], dim=0)
        mean = sum(outputs) / num_experts
        spread += sum((output - mean).norm() ** 2 for output in outputs) / sum(
            output.norm() ** 2 for output in outputs
        )
    return cosines / len(hidden_states), (spread / len(hidden_states)).item()


def test_three_experts_by_hand(all_tokens):
    """For the tokens (1, 0) and (0, 1): the token, twice the token, and (1, 1).

    Cosines: 1 between the first two; with the third 1 / sqrt 2. Spread for (1, 0): the mean is (4/3, 1/3), distances
    2/9, 5/9 and 5/9 of 1 + 4 + 2.
    """
    layer = _layer(lambda x: x, lambda x: 2 * x, torch.ones_like)

    result = _measured(_subject([layer]), _tokens(torch.eye(2)))

    root = 1 / math.sqrt(2)
    assert result.tables["similarity"] == [
        [pytest.approx(row) for row in ([1, 1, root], [1, 1, root], [root, root, 1])]
    ]
    assert result.per_layer["expert_output_similarity"] == [pytest.approx((1 + 2 * root) / 3)]
    assert result.per_layer["expert_output_spread"] == [pytest.approx(4 / 3 / 7)]
    assert result.tables["tokens"] == [2]


def test_opposite_experts_have_no_mean(all_tokens):
    result = _measured(_subject([_layer(lambda x: x, lambda x: -x)]), _tokens(torch.ones(3, 4)))

    assert result.per_layer == {"expert_output_similarity": [-1.0], "expert_output_spread": [1.0]}


@pytest.mark.parametrize("kind", ["linear", "zero experts", "mixtral", "olmoe"])
def test_each_expert_computes_each_token(all_tokens, kind):
    layer, hidden_states = _of_model(kind)
    cosines, spread = _naive(layer, hidden_states)

    result = _measured(_subject([layer]), _tokens(hidden_states))

    torch.testing.assert_close(torch.tensor(result.tables["similarity"][0]).double(), cosines, atol=1e-5, rtol=0)
    pairs = [cosines[pair].item() for pair in itertools.combinations(range(len(cosines)), 2)]
    assert result.per_layer["expert_output_similarity"] == [pytest.approx(sum(pairs) / len(pairs), abs=1e-5)]
    assert result.per_layer["expert_output_spread"] == [pytest.approx(spread, abs=1e-5)]


def test_bfloat16_models_are_summed_in_double_precision(all_tokens):
    """The outputs are rounded, what is made of them is not."""
    layer, hidden_states = _of_model("linear", dtype=torch.bfloat16)
    outputs = torch.stack(list(layer.expert_outputs(hidden_states))).double()
    cosines = torch.cosine_similarity(outputs[:, None], outputs[None], dim=-1).mean(dim=-1)

    result = _measured(_subject([layer]), _tokens(hidden_states))

    similarity = torch.tensor(result.tables["similarity"][0], dtype=torch.float64)
    torch.testing.assert_close(similarity, cosines, atol=1e-9, rtol=0)
    torch.testing.assert_close(similarity, _naive(layer, hidden_states)[0], atol=0.01, rtol=0)


def test_copies_are_the_same(all_tokens):
    layer, hidden_states = _of_model("linear")
    with torch.no_grad():
        for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
            weight.copy_(weight[:1].expand_as(weight))

    result = _measured(_subject([layer]), _tokens(hidden_states))

    assert result.per_layer["expert_output_similarity"] == [pytest.approx(1.0, abs=1e-9)]
    assert result.per_layer["expert_output_spread"] == [0.0]


def test_zeros_have_no_angle(all_tokens):
    """The second expert gives zeros for the first token, the third for both; for the last token all do."""
    layer = _layer(lambda x: x, lambda x: x * torch.tensor([0.0, -1.0]), torch.zeros_like)

    result = _measured(_subject([layer]), _tokens(torch.eye(3, 2)))

    assert result.tables["similarity"] == [[[1.0, -1.0, None], [-1.0, 1.0, None], [None, None, None]]]
    assert result.per_layer["expert_output_similarity"] == [-1.0]
    # 1 - 3 * (1/9) / 1 for the first token, 1 for the second.
    assert result.per_layer["expert_output_spread"] == [pytest.approx(5 / 6)]


def test_layers_of_zeros_or_of_one_expert_have_no_figures(all_tokens):
    zeros = _measured(_subject([_layer(torch.zeros_like, torch.zeros_like)]), _tokens(torch.eye(2)))
    single = _measured(_subject([_layer(lambda x: x)]), _tokens(torch.eye(2)))

    for result in (zeros, single):
        assert result.per_layer == {"expert_output_similarity": [None], "expert_output_spread": [None]}
    assert single.notes


@pytest.mark.parametrize(
    ("block_size", "num_positions", "positions"),
    [(8, 2, [2, 6]), (9, 3, [1, 4, 7]), (3, 5, [0, 1, 2]), (512, 2, [128, 384])],
)
def test_positions_are_evenly_spaced(block_size, num_positions, positions):
    assert spaced_positions(block_size, num_positions) == positions


def test_tokens_come_from_all_over_a_domain_until_there_are_enough(monkeypatch):
    monkeypatch.setattr(expert_outputs, "TOKENS_PER_BLOCK", 2)
    monkeypatch.setattr(expert_outputs, "MAX_TOKENS", 5)
    seen = []
    layer = _layer(lambda tokens: (seen.extend(tokens[:, 0].tolist()), tokens)[1], torch.ones_like)
    hidden_states = torch.arange(64.0)[:, None].expand(-1, 2)

    result = _measured(_subject([layer], 2), _tokens(hidden_states, 8), _tokens(hidden_states[:8] + 100, 1, domain=1))

    assert seen == [2, 6, 10, 14, 18, 102, 106]
    assert result.tables["tokens"] == [7]


def test_batches_do_not_matter(monkeypatch):
    monkeypatch.setattr(expert_outputs, "TOKENS_PER_BLOCK", 2)
    monkeypatch.setattr(expert_outputs, "MAX_TOKENS", 5)
    layer, hidden_states = _of_model("linear")
    tokens = _tokens(hidden_states, 4)
    whole = _measured(_subject([layer]), tokens)

    in_parts = _measured(_subject([layer]), block_of(tokens, 0), block_of(tokens, 1, 2), block_of(tokens, 3))
    monkeypatch.setattr(expert_outputs, "CHUNK_VALUES", 2 * 4 * 32)
    in_chunks = _measured(_subject([layer]), tokens)
    monkeypatch.setattr(expert_outputs, "MAX_VALUES", 3 * 4 * 32)
    in_calls = _measured(_subject([layer]), tokens)

    for result in (in_parts, in_chunks, in_calls):
        similarity, expected = (torch.tensor(each.tables["similarity"]) for each in (result, whole))
        torch.testing.assert_close(similarity, expected, atol=1e-6, rtol=0)
        assert result.per_layer["expert_output_spread"] == pytest.approx(whole.per_layer["expert_output_spread"])
        assert result.tables["tokens"] == whole.tables["tokens"] == [5]


def test_experts_compute_many_tokens_at_a_time(all_tokens, monkeypatch):
    """Whatever the batches are; at the end those that remain."""
    monkeypatch.setattr(expert_outputs, "TOKENS_PER_CALL", 4)
    calls = []
    layer = _layer(lambda tokens: (calls.append(len(tokens)), tokens)[1], torch.ones_like)

    result = _measured(_subject([layer], 2), *(_tokens(torch.ones(2, 3), domain=domain) for domain in (0, 0, 0, 1, 1)))

    assert calls == [4, 4, 2]
    assert result.tables["tokens"] == [10]


def test_a_domain_has_1024_tokens_at_most():
    """Of 32 in each of 40 blocks."""
    layer = _layer(lambda tokens: tokens, torch.ones_like)

    result = _measured(_subject([layer], 2), *(_tokens(torch.ones(1280, 2), 40, domain) for domain in range(2)))

    assert result.tables["tokens"] == [2 * 1024]
