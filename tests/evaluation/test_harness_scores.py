"""Scores against a naive reference: one forward pass a token, no batches, no padding."""

import copy
import math
import statistics
import string
from contextlib import contextmanager

import pytest
import torch
from benchmark_items import MULTIPLE_CHOICE, write_items

from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.evaluation.harness import load_tasks, score_tasks
from upcycled_moe.evaluation.language_model import LanguageModel


@torch.no_grad()
def log_probability(model, tokenizer, prompt, answer):
    """Return the sum over the tokens of `answer` of the logarithm of their probability."""
    tokens, total = tokenizer.encode(prompt + answer), 0.0
    for end in range(len(tokenizer.encode(prompt)), len(tokens)):
        logits = model(torch.tensor([tokens[:end]])).logits[0, -1].double()
        total += torch.log_softmax(logits, -1)[tokens[end]].item()
    return total


@torch.no_grad()
def written_answer(model, tokenizer, prompt, num_tokens=128):
    """Return what the model writes greedily, up to a stop sign."""
    tokens = tokenizer.encode(prompt)
    num_read = len(tokens)
    while len(tokens) < num_read + num_tokens and tokens[-1] != tokenizer.eos_token_id:
        tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    text = tokenizer.decode(tokens[num_read:], skip_special_tokens=True)
    for stop in ("\n", ".", ","):
        text = text.split(stop)[0]
    return text.strip()


def mean_and_error(scores):
    return statistics.mean(scores), statistics.stdev(scores) / math.sqrt(len(scores))


# What each task asks of an item: prompts and answers, in pairs.
ASKED = {
    "openbookqa": lambda row: [(row["question"], f" {choice}") for choice in row["choices"]],
    "arc_easy": lambda row: [(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]],
    "winogrande": lambda row: [
        (row["question"].split(" _")[0] + f" {choice}", row["question"].split("_")[1]) for choice in row["choices"]
    ],
    "boolq": lambda row: [
        (f"{row['context']}\nQuestion: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]
    ],
}


@pytest.fixture(scope="module")
def found(model, tokenizer, items):
    return score_tasks(LanguageModel(model, tokenizer, 4), load_tasks(["router_upcycling"], items))


@pytest.mark.parametrize("task", ASKED)
def test_accuracies_are_those_of_summed_log_probabilities(model, tokenizer, found, task):
    right, right_by_length = [], []
    for row in MULTIPLE_CHOICE[task]:
        sums = [log_probability(model, tokenizer, *pair) for pair in ASKED[task](row)]
        by_length = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        right.append(float(sums.index(max(sums)) == row["answer"]))
        right_by_length.append(float(by_length.index(max(by_length)) == row["answer"]))
    scores = found[0][task]
    assert (scores["acc"].value, scores["acc"].stderr) == pytest.approx(mean_and_error(right))
    if "acc_norm" in scores:
        assert (scores["acc_norm"].value, scores["acc_norm"].stderr) == pytest.approx(mean_and_error(right_by_length))


def test_the_items_tell_the_two_accuracies_apart(found):
    assert found[0]["openbookqa"]["acc"] != found[0]["openbookqa"]["acc_norm"]


def test_log_probabilities_are_those_of_single_tokens(model, tokenizer, items):
    task = load_tasks(["openbookqa"], items).tasks["openbookqa"]
    task.build_all_requests()
    asked = LanguageModel(model, tokenizer, 5)
    for instance, (total, _) in zip(task.instances, asked.loglikelihood(task.instances), strict=True):
        assert total == pytest.approx(log_probability(model, tokenizer, *instance.args), abs=1e-4)


def test_an_answer_is_right_if_the_model_writes_any_of_them(model, tokenizer, tmp_path):
    questions = ["who was it", "what is that", "where was the one in it"]
    prompts = [f"Answer these questions:\n\nQ: {question}?\nA:" for question in questions]
    answers = [written_answer(model, tokenizer, prompt) for prompt in prompts]
    assert all(any(letter.isalnum() for letter in answer) for answer in answers)
    # Case and punctuation do not count.
    open_qa = [
        {"question": questions[0], "answers": ["something else", f"{answers[0].swapcase()}!"]},
        {"question": questions[1], "answers": [answers[1] + " and on"]},
        {"question": questions[2], "answers": ["that", "this"]},
    ]
    assert not {answer.lower().strip(string.punctuation) for answer in answers[1:]} & {"that", "this"}
    tasks = load_tasks(["nq_open"], write_items(tmp_path, open_qa={"nq_open": open_qa}))
    [score] = score_tasks(LanguageModel(model, tokenizer, 2), tasks)[0]["nq_open"].values()
    assert (score.value, score.stderr) == pytest.approx(mean_and_error([1.0, 0.0, 0.0]))


def test_what_guessing_gives(found):
    chances = {name: info.chance for name, info in found[1].items()}
    assert chances["openbookqa"] == 1 / 4
    assert chances["arc_easy"] == pytest.approx((1 / 3 + 1 / 5) / 2)
    assert chances["winogrande"] == chances["boolq"] == chances["copa"] == 1 / 2
    assert chances["nq_open"] == 0


def test_a_limit_takes_the_first_items(model, tokenizer, items):
    scores, infos, _ = score_tasks(LanguageModel(model, tokenizer, 4), load_tasks(["arc_easy"], items), limit=1)
    assert (infos["arc_easy"].num_items, infos["arc_easy"].num_available) == (1, 2)
    assert infos["arc_easy"].chance == 1 / 3
    assert scores["arc_easy"]["acc"].stderr is None


def test_items_that_do_not_fit_are_counted_and_cut_from_the_left(model, tokenizer, tmp_path):
    end = "\nQuestion: is this it?\nAnswer:"
    num_positions = model.config.max_position_embeddings
    rows = [
        {"context": "the " * length, "question": "is this it?", "choices": ["no", "yes"], "answer": 1}
        for length in (2, 2 * num_positions)
    ]
    tasks = load_tasks(["boolq"], write_items(tmp_path, {"boolq": rows}))
    asked = LanguageModel(model, tokenizer, 2)
    score_tasks(asked, tasks)
    assert asked.num_truncated() == {"boolq": 1}
    prompt = tokenizer.encode("the " * 2 * num_positions + end)
    answer = tokenizer.encode(" yes")
    # The last token of the answer is not read.
    read = (prompt + answer)[-num_positions - 1 : -1]
    with torch.no_grad():
        log_probabilities = model(torch.tensor([read])).logits[0].double().log_softmax(-1)
    expected = sum(log_probabilities[-len(answer) + at, token].item() for at, token in enumerate(answer))
    [(total, _)] = [
        instance.resps[0] for instance in tasks.tasks["boolq"].instances if (instance.doc_id, instance.idx) == (1, 1)
    ]
    assert total == pytest.approx(expected, abs=1e-4)


def test_an_answer_that_exactly_fits_is_not_counted(model, tokenizer, tmp_path):
    num_positions = model.config.max_position_embeddings
    template = "Question: {}\nAnswer:"
    answers = ["is", "it"]
    used = len(tokenizer.encode(template.format("the") + " is"))
    question = "the" + " the" * (num_positions + 1 - used)
    assert len(tokenizer.encode(template.format(question) + " is")) == num_positions + 1
    rows = [
        {"question": question, "choices": answers, "answer": 0},
        {"question": question + " the", "choices": answers, "answer": 0},
    ]
    asked = LanguageModel(model, tokenizer, 2)
    tasks = load_tasks(["arc_easy"], write_items(tmp_path, {"arc_easy": rows}))
    score_tasks(asked, tasks)
    assert asked.truncated == {("arc_easy", 1)}


def test_an_answer_longer_than_the_model_is_an_error(model, tokenizer, tmp_path):
    long = "the " * 2 * model.config.max_position_embeddings
    rows = [{"question": "It is", "choices": [long, "a"], "answer": 1}]
    tasks = load_tasks(["arc_easy"], write_items(tmp_path, {"arc_easy": rows}))
    with pytest.raises(SettingsError, match=r"arc_easy: an answer of \d+ tokens is longer than the model's 256"):
        score_tasks(LanguageModel(model, tokenizer, 2), tasks)


def test_questions_that_leave_no_room_for_an_answer_are_counted(model, tokenizer, tmp_path):
    prompt, answer = "Answer these questions:\n\nQ: {}?\nA:", "it was the"
    room = model.config.max_position_embeddings - 2 * len(tokenizer.encode(answer))
    fits = "the" + " the" * (room - len(tokenizer.encode(prompt.format("the"))))
    assert len(tokenizer.encode(prompt.format(fits))) == room
    rows = [{"question": question, "answers": ["it", answer]} for question in (fits, fits + " the")]
    asked = LanguageModel(model, tokenizer, 2)
    score_tasks(asked, load_tasks(["nq_open"], write_items(tmp_path, open_qa={"nq_open": rows})))
    assert asked.truncated == {("nq_open", 1)}


def test_an_answer_may_be_twice_as_long_as_the_longest_right_one(model, tokenizer, tmp_path):
    longest = "it was the and to of " * 5
    rows = [{"question": "who?", "answers": ["the", longest]}, {"question": "who was it?", "answers": ["it"]}]
    asked = LanguageModel(model, tokenizer, 2)
    score_tasks(asked, load_tasks(["triviaqa"], write_items(tmp_path, open_qa={"triviaqa": rows})))
    assert asked.num_new_tokens == {"triviaqa": 2 * len(tokenizer.encode(longest))}


def test_an_answer_is_never_longer_than_the_harness_allows(model, tokenizer, tmp_path):
    rows = [{"question": "who was it?", "answers": ["the " * 1000]}]
    asked = LanguageModel(model, tokenizer, 2)
    score_tasks(asked, load_tasks(["triviaqa"], write_items(tmp_path, open_qa={"triviaqa": rows})))
    assert asked.num_new_tokens == {"triviaqa": asked.max_gen_toks}


def test_a_task_that_writes_more_than_the_model_holds_is_an_error(model, tokenizer, items):
    task = load_tasks(["nq_open"], items).tasks["nq_open"]
    task.set_config("generation_kwargs", {"max_gen_toks": 256}, update=True)
    task.build_all_requests()
    with pytest.raises(SettingsError, match="nq_open: generates up to 256 tokens, and the model has 256 positions"):
        LanguageModel(model, tokenizer, 2).generate_until(task.instances)


@pytest.mark.parametrize("task", ["boolq", "nq_open"])
def test_logits_that_are_no_numbers_give_no_score(model, tokenizer, items, task):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(SettingsError, match=f"^tiny: its log-probabilities on {task} are not finite; .* float32"):
        score_tasks(LanguageModel(broken, tokenizer, 2, "tiny"), load_tasks([task], items))


def test_items_are_those_of_the_figure_that_stands_for_a_task(found):
    scores, infos, items = found
    for name, info in infos.items():
        assert len(items[name]) == info.num_items
        assert statistics.mean(items[name]) == pytest.approx(scores[name][info.metric].value)


def test_a_small_model_writes_half_of_its_positions_where_the_task_does_not_say(model, tokenizer):
    assert LanguageModel(model, tokenizer, 2).max_gen_toks == model.config.max_position_embeddings // 2


class CountingProgress(Progress):
    """Keeps what was announced, and what was done."""

    def __init__(self):
        self.announced, self.done = [], []

    @contextmanager
    def task(self, description, total, unit):
        self.announced.append(total)
        advances = []
        yield advances.append
        self.done.append(sum(advances))


def test_progress_counts_every_request(model, tokenizer, items):
    progress = CountingProgress()
    tasks = load_tasks(["arc_easy", "nq_open"], items)
    score_tasks(LanguageModel(model, tokenizer, 4, "tiny", progress), tasks)
    assert progress.announced == progress.done == [8, 1]
