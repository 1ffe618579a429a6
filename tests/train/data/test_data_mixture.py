"""Domains by weight: exact shares, domains that start over by themselves, and weights that must name them all."""

import json
from itertools import islice

import pytest

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.arguments import DataArguments
from upcycled_moe.train.data.mixture import TokenMixture, used_weights
from upcycled_moe.train.data.sources import training_blocks


class _Characters:
    """A tokenizer whose tokens are code points."""

    eos_token_id = None

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


LENGTHS = {"math": 7, "code": 3, "law": 11}


@pytest.fixture
def files(tmp_path):
    """Documents of one length, and few of them: each domain is read through soon."""
    for name, length in LENGTHS.items():
        texts = [name[0] * length] * 4
        (tmp_path / f"{name}_train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(tmp_path)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _blocks(train_data, block_size=5, **settings):
    data_args = DataArguments(train_data=[train_data], block_size=block_size, document_mask=False, **settings)
    return training_blocks(data_args, _Characters(), seed=0)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "weights", [{"math": 2, "code": 1, "law": 1}, {"math": 1, "code": 0, "law": 0.1}, {"math": 1, "code": 9, "law": 3}]
)
def test_every_domain_has_its_share_of_the_tokens_to_within_one_document(files, streaming, weights):
    mixture = _blocks(files, streaming=streaming, domain_weights=weights).source
    num_tokens = dict.fromkeys(weights, 0)
    for tokens in islice(mixture, 400):
        domain = {"m": "math", "c": "code", "l": "law"}[chr(tokens[0])]
        num_tokens[domain] += len(tokens)
        total = sum(num_tokens.values())
        for name, weight in weights.items():
            lag = total * weight / sum(weights.values()) - num_tokens[name]
            assert abs(lag) <= max(LENGTHS.values())
    # Four documents of each: every domain has started over, each as often as its share asks for.
    assert mixture.state_dict()["num_tokens"] == {name: num for name, num in num_tokens.items() if weights[name]}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_mixture_resumes_at_any_block(files, streaming):
    weights = {"math": 2, "code": 1, "law": 1}

    def mixed():
        return _blocks(files, streaming=streaming, domain_weights=weights)

    expected = list(islice(mixed(), 40))
    blocks = mixed()
    iterator = iter(blocks)
    for position in range(30):
        resumed = mixed()
        resumed.load_state_dict(json.loads(json.dumps(blocks.state_dict())))
        assert list(islice(resumed, 5)) == expected[position : position + 5]
        next(iterator)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_file_may_name_the_domain_of_each_document(tmp_path, streaming):
    rows = [{"text": domain[0] * 3, "domain": domain} for domain in ("math", "code", "code")]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not streaming:
        blocks = _blocks(str(file), streaming=False, domain_weights={"math": 1, "code": 1})
        assert {chr(tokens[0]) for tokens in islice(blocks.source, 4)} == {"m", "c"}
        assert blocks.source.state_dict()["num_tokens"] == {"code": 6, "math": 6}
        return
    with pytest.raises(SettingsError, match=r"mixed.jsonl: there are documents of 'math' and of 'code'.*streaming=f"):
        list(islice(_blocks(str(file), streaming=True, domain_weights={"math": 1}), 4))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"maths": 1}, "unknown key 'maths'; did you mean 'math'?"),
        ({"math": 1}, "says nothing of 'code'"),
        ({"math": -1, "code": 1}, "weights are 0 or above"),
        ({"math": 0, "code": 0}, "one at least is above 0"),
        ({"math": float("nan"), "code": 1}, "weights are 0 or above"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_domains_are_refused(weights, message):
    with pytest.raises(SettingsError) as error:
        used_weights(weights, ["math", "code"])
    assert message in str(error.value)


def test_a_tie_goes_to_the_domain_that_is_named_first():
    class _Ones:
        def __iter__(self):
            while True:
                yield [self.number]

        def load_state_dict(self, state):
            pass

        def state_dict(self):
            return {}

    sources = {"a": _Ones(), "b": _Ones()}
    sources["a"].number, sources["b"].number = 0, 1
    assert list(islice(TokenMixture(sources, {"a": 1, "b": 1}), 4)) == [[0], [1], [0], [1]]
