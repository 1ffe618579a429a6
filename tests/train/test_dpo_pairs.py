"""Which pairs the rounds of DPO and the merge of their reference get: shares, label noise, prompts in common."""

import json
from pathlib import Path

import pytest
from training_runs import command_line

from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.preference.dpo_arguments import parse_arguments
from upcycled_moe.train.preference.round_pairs import PairSets, read_pair_sets


class Warnings(Progress):
    """Keeps what it is warned of."""

    def __init__(self):
        self.messages = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


def write_pairs(path: Path, prompts: list[str]) -> Path:
    rows = [{"prompt": prompt, "chosen": f"good {i}", "rejected": f"bad {i}"} for i, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def read(tmp_path):
    """`read(prompts, **settings)`: the pairs of a run whose training pairs have these prompts, and the warnings."""

    def reading(prompts: list[str], **settings) -> tuple[PairSets, list[str]]:
        paths = {
            "model_name_or_path": "model",
            "output_dir": tmp_path / "out",
            "train_data": write_pairs(tmp_path / "train.jsonl", prompts),
            "eval_data": write_pairs(tmp_path / "test.jsonl", ["other", "Why 0?"]),
        }
        warnings = Warnings()
        share = {} if "merge_data" in settings else {"merge_share": 0.2}
        settings = {"use_cpu": True, **share, **paths, **settings}
        return read_pair_sets(parse_arguments(command_line(settings)), warnings), warnings.messages

    return reading


def prompts_of(pairs) -> set[str]:
    return {prompt[0]["content"] for prompt in pairs["prompt"]}


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_is_spread_over_the_merge_and_the_rounds(read, seed):
    sets, _ = read([f"Why {number}?" for number in range(1000)], num_rounds=4, flip_rate=0.3, seed=seed)
    parts = [sets.merge, *sets.rounds]
    assert [len(part) for part in parts] == [200] * 5
    num_flipped = [sum(answer[0]["content"].startswith("bad") for answer in part["chosen"]) for part in parts]
    assert sum(num_flipped) == 300
    # Hypergeometric, with a standard deviation of 5.8.
    assert all(abs(number - 60) < 4 * 5.8 for number in num_flipped), num_flipped


@pytest.mark.parametrize("round_data", ["shares", "same"])
def test_shares_have_no_prompt_in_common(read, round_data):
    prompts = [f"Why {number % 40}?" for number in range(200)]
    sets, _ = read(prompts, num_rounds=2, round_data=round_data)
    parts = [sets.merge, sets.rounds[0], *sets.rounds[1:] * (round_data == "shares")]
    # 5 pairs have one prompt, and a part ends with whole prompts.
    assert [len(part) for part in parts] == ([40, 80, 80] if round_data == "shares" else [40, 160])
    assert sum(len(prompts_of(part)) for part in parts) == len(set.union(*map(prompts_of, parts))) == 40
    assert (sets.rounds[0] is sets.rounds[1]) == (round_data == "same")


def test_too_few_prompts_for_all_rounds_are_an_error(read):
    with pytest.raises(SettingsError, match=r"100 training pairs cannot be shared out to num_rounds=3"):
        read(["Why 0?", "Why 1?"] * 50, num_rounds=3)


def test_prompts_that_are_trained_on_and_measured_with_are_told(read, tmp_path):
    prompts = [f"Why {number}?" for number in range(10)]
    _, messages = read(prompts, num_rounds=2)
    assert [message.partition(",")[0].partition(" have")[0] for message in messages] == ["eval_data: 1 of 2 pairs"]
    merge_data = write_pairs(tmp_path / "merge.jsonl", ["Why 3?", "Why 4?", "new"])
    sets, messages = read(prompts, num_rounds=2, merge_data=merge_data)
    assert "merge_data: 2 of 3 pairs have a prompt that train_data has too" in messages[-1]
    assert (len(sets.merge), sum(map(len, sets.rounds))) == (3, 10)


def test_pairs_that_say_nothing_are_told(read, tmp_path):
    row = {"prompt": "Why?", "chosen": "same", "rejected": "same"}
    path = write_pairs(tmp_path / "merge.jsonl", ["a", "b"])
    path.write_text(path.read_text() + json.dumps(row) + "\n", encoding="utf-8")
    _, messages = read(["c", "d", "e"], num_rounds=2, merge_data=path)
    assert "1 of 3 pairs are left out" in messages[-1]
