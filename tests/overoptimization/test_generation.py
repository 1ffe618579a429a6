import json
import shutil

import pytest
import torch
from fresh_models import Warnings
from transformers import Qwen2ForCausalLM

from upcycled_moe.common.checkpoint_names import NamedCheckpoint
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.overoptimization.generation import generate_samples, read_prompts, sample_facts
from upcycled_moe.overoptimization.settings import PolicySettings


PROMPTS = [[{"role": "user", "content": text}] for text in ("the first", "the second", "the third")]


def drawn(folder, prompts=PROMPTS, progress=None, batch_size=8, **changes):
    settings = PolicySettings(
        NamedCheckpoint("policy", str(folder)), ["unused"], **{"num_samples": 12, "max_new_tokens": 4, **changes}
    )
    return generate_samples(settings, prompts, batch_size=batch_size, progress=progress)


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def read(*places, **changes):
    return read_prompts(PolicySettings(NamedCheckpoint("policy", "x"), places, **changes))


@pytest.fixture(scope="module")
def samples(policy):
    return drawn(policy)


def test_each_prompt_gets_its_responses(samples):
    assert samples.prompts == PROMPTS
    assert samples.shape == (3, 12)
    assert len({text for texts in samples.responses for text in texts}) > 30
    assert not any("<|" in text or "assistant" in text for texts in samples.responses for text in texts)


def test_the_same_seed_draws_the_same(policy, samples):
    assert drawn(policy).responses == samples.responses
    assert drawn(policy, seed=1).responses != samples.responses


def test_a_prompt_more_changes_no_other(policy, samples):
    assert drawn(policy, PROMPTS[:2]).responses == samples.responses[:2]


def test_drawing_leaves_the_random_state_of_others_alone(policy):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    drawn(policy, PROMPTS[:2], num_samples=2)
    assert torch.equal(torch.rand(1), expected)


def test_tokens_come_from_the_whole_distribution(policy):
    """The default of Transformers is the 50 likeliest tokens, and that of this policy the likeliest."""
    texts = drawn(policy, PROMPTS[:2], batch_size=300, num_samples=300, max_new_tokens=1).responses
    assert min(len(set(of_prompt)) for of_prompt in texts) > 60


def test_responses_end_where_the_chat_template_ends_an_answer(policy):
    progress = Warnings()
    samples = drawn(policy, PROMPTS[:2], progress, batch_size=32, num_samples=32, max_new_tokens=190)
    # Each token is one of 295, all alike, of which two end a response: the end of the text and that of the turn.
    expected, deviation = 64 * (293 / 295) ** 190, 3.6
    assert samples.origin["num_cut"] == pytest.approx(expected, abs=3 * deviation)
    assert f"{samples.origin['num_cut']} of 64 responses do not end within 190 tokens" in progress.messages[0]


def test_prompts_that_leave_no_place_are_left_out(policy):
    long = [{"role": "user", "content": "the " * 300}]
    progress = Warnings()
    samples = drawn(policy, [PROMPTS[0], long, PROMPTS[2]], progress)
    assert samples.prompts == [PROMPTS[0], PROMPTS[2]]
    assert samples.origin["num_prompts_left_out"] == 1
    assert progress.messages[0] == "1 of 3 prompts are longer than 252 tokens and are left out."
    with pytest.raises(SettingsError, match="1 of 2 prompts leave 4 of the model's 256 positions"):
        drawn(policy, [PROMPTS[0], long])


def test_the_facts_tell_samples_apart(policy):
    def facts(prompts=PROMPTS, batch_size=8, dtype="auto", **changes):
        settings = PolicySettings(NamedCheckpoint("policy", str(policy)), ["x"], **{"num_samples": 12, **changes})
        return sample_facts(settings, prompts, batch_size=batch_size, dtype=dtype)

    assert facts() == facts()
    others = [facts(PROMPTS[:2]), facts(temperature=0.5), facts(num_samples=2), facts(max_new_tokens=1), facts(seed=1)]
    others += [facts(batch_size=4), facts(dtype="bfloat16")]
    assert all(other != facts() for other in others)
    # No batch is larger than what is drawn.
    assert facts(batch_size=12) == facts(batch_size=100)


def test_the_samples_say_how_they_were_drawn(samples, policy):
    settings = PolicySettings(NamedCheckpoint("policy", str(policy)), ["x"], num_samples=12, max_new_tokens=4)
    assert sample_facts(settings, PROMPTS, batch_size=8).items() <= samples.origin.items()


def test_a_policy_without_a_chat_template_is_refused(policy, tmp_path):
    folder = shutil.copytree(policy, tmp_path / "policy", ignore=shutil.ignore_patterns("*.jinja"))
    with pytest.raises(SettingsError, match="no chat template"):
        drawn(folder)


def test_a_prompt_that_the_template_refuses(policy, tmp_path):
    folder = shutil.copytree(policy, tmp_path / "policy")
    template = "{{ raise_exception('no systems') if messages[0].role == 'system' else messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(SettingsError, match=r"its chat template refuses a prompt \(no systems\)"):
        drawn(folder, [[{"role": "system", "content": "be brief"}, *prompt] for prompt in PROMPTS])


def test_a_reward_model_is_no_policy(reward_model):
    with pytest.raises(SettingsError, match="is no language model"):
        drawn(reward_model(0))


def test_prompts_of_a_file(tmp_path):
    rows = [
        {"prompt": "one"},
        {"prompt": [{"role": "user", "content": "two"}]},
        {"prompt": "one"},
        {"prompt": "three"},
    ]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    assert [prompt[0]["content"] for prompt in read(path)] == ["one", "two", "three"]
    assert len(read(path, max_prompts=2)) == 2


def test_prompts_of_pairs(tmp_path):
    rows = [
        {"chosen": f"\n\nHuman: {text}\n\nAssistant: yes{number}", "rejected": f"\n\nHuman: {text}\n\nAssistant: no"}
        for number, text in enumerate(("one", "two", "one"))
    ]
    assert read(write_rows(tmp_path / "pairs.jsonl", rows)) == [
        [{"role": "user", "content": text}] for text in ("one", "two")
    ]


def test_one_prompt_is_too_few(tmp_path):
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "one"}, {"prompt": "one"}])
    with pytest.raises(SettingsError, match="1 different prompts; give 2 at least"):
        read(path)


def test_low_temperature_draws_what_is_likeliest(write_model):
    folder = write_model(Qwen2ForCausalLM, seed=3)
    cold = drawn(folder, PROMPTS[:2], num_samples=4, temperature=1e-4)
    assert all(len(set(texts)) == 1 for texts in cold.responses)
