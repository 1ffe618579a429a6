"""Answers that a policy draws, whatever its checkpoint says of generation, and which prompts it gets."""

import copy

import pytest
from dense_checkpoints import byte_level_tokenizer

from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.preference.dpo_sampling import Sampling, sample_answers, tell_unfinished, with_room
from upcycled_moe.train.preference.log_probabilities import Answer


class Warnings(Progress):
    """Keeps what it is warned of."""

    def __init__(self):
        self.messages = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.fixture
def model(make_dense, tokenizer):
    return make_dense(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=0)


@pytest.mark.parametrize("own", [{"repetition_penalty": 1e-3}, {"min_p": 0.9}, {"suppress_tokens": [*range(1, 250)]}])
def test_answers_are_those_of_the_policy_whatever_its_checkpoint_says(model, tokenizer, own):
    sampling = Sampling(num_samples=4, max_new_tokens=8, temperature=1.0, batch_size=4)
    expected = sample_answers(model, tokenizer, [[5, 6, 7]], sampling, seed=0)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    config = model.generation_config
    assert sample_answers(model, tokenizer, [[5, 6, 7]], sampling, seed=0) == expected
    assert model.generation_config is config


def test_prompts_without_room_for_an_answer_are_left_out(tokenizer):
    prompts = [[{"role": "user", "content": text}] for text in ("the", "the " * 30, "of")]
    warnings = Warnings()
    kept, tokens = with_room(tokenizer, prompts, 8, "round 1", warnings)
    assert kept == [prompts[0], prompts[2]]
    assert tokens == [tokenizer(text).input_ids for text in ("the", "of")]
    (message,) = warnings.messages
    assert message.startswith("round 1: 1 of 3 prompts are longer than max_length - max_new_tokens = 8 tokens")
    with pytest.raises(SettingsError, match=r"round 1: all 1 prompts are longer"):
        with_room(tokenizer, prompts[1:2], 8, "round 1", warnings)
    length = len(tokens[0])
    assert with_room(tokenizer, prompts[:1], length, "round 1", Progress())[1] == tokens[:1]


def test_answers_that_do_not_end_are_told(tokenizer):
    sampling = Sampling(num_samples=1, max_new_tokens=2, temperature=1.0, batch_size=4)
    end = tokenizer.eos_token_id
    answers = [Answer([5], [6, end]), Answer([5], [6, 7]), Answer([5], [end])]
    warnings = Warnings()
    tell_unfinished(tokenizer, answers, sampling, "round 1", warnings)
    assert warnings.messages == ["round 1: 1 of 3 answers do not end within max_new_tokens=2, and are cut."]
    tell_unfinished(tokenizer, [answers[0], answers[2]], sampling, "round 1", warnings)
    assert len(warnings.messages) == 1
