"""Text of a study: exchanges of people, the policy's responses, and labelled pairs of them."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upcycled_moe.common.settings import SettingsError

from .files import (
    GOLD,
    GOLD_SAMPLES_FILE,
    GOLD_TRAIN_FILE,
    HUMAN_FILES,
    LABELS_FILE,
    MERGE_SAMPLES_FILE,
    MODEL_FOLDER,
    ORIGINS_FILE,
    PAIRS_FILE,
    POLICY,
    POLICY_TEXT_FILE,
    POLICY_VALIDATION_FILE,
    PREFERENCES_FILE,
    PROMPTS_FILES,
    SAMPLES,
    TABLE_FILE,
    TEXT,
    TRAINING_SAMPLES_FILE,
    read_lines,
    write_lines,
)


# Exchanges, pairs and noise are drawn with one seed: those of the study are for what is compared.
SEED = 0
# Of the text of the policy, what it is measured on.
_VALIDATION_SHARE = 0.03

Messages = list[dict[str, str]]


def render(messages: Messages) -> str:
    """Return messages in ChatML, for text; the tokenizer has the same as its template."""
    return "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)


def prepare_text(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Write what the policy learns from, people's pairs for gold, and prompts to answer.

    A model this small has no use for a long context: of a dialogue it gets the last question, for pairs and prompts,
    and each exchange by itself, for the policy.
    """
    from upcycled_moe.preference.pairs import read_pairs
    from upcycled_moe.preference.settings import PairSettings

    pairs: dict[str, list[dict[str, Any]]] = {}
    exchanges: list[Messages] = []
    for split, file in HUMAN_FILES.items():
        read = read_pairs(PairSettings([str(inputs[f"{name}_{split}"]) for name in settings["sources"]]))
        if split == "train":
            exchanges = list(_exchanges(read, settings))
        pairs[split] = [{**row, "prompt": row["prompt"][-1:]} for row in read if _is_short(row, settings)]
        write_lines(folder / file, pairs[split])
        prompts = _different(row["prompt"] for row in pairs[split])
        random.Random(SEED).shuffle(prompts)
        write_lines(folder / PROMPTS_FILES[split], ({"prompt": prompt} for prompt in prompts))
    random.Random(SEED).shuffle(exchanges)
    num_validation = round(_VALIDATION_SHARE * len(exchanges))
    texts = [{"text": render(exchange)} for exchange in exchanges]
    write_lines(folder / POLICY_TEXT_FILE, texts[num_validation:])
    write_lines(folder / POLICY_VALIDATION_FILE, texts[:num_validation])


def _is_short(row: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    answers = [row[column][-1]["content"] for column in ("chosen", "rejected")]
    is_short_question = len(row["prompt"][-1]["content"]) <= settings["max_prompt_characters"]
    return is_short_question and all(0 < len(answer) <= settings["max_answer_characters"] for answer in answers)


def _exchanges(pairs: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> Iterator[Messages]:
    """Return each question with its answer, the preferred one at the end of a dialogue."""
    dialogues = ([*row["prompt"], *row["chosen"]] for row in pairs)
    exchanges = _different(dialogue[at : at + 2] for dialogue in dialogues for at in range(0, len(dialogue) - 1, 2))
    for question, answer in exchanges:
        is_exchange = (question["role"], answer["role"]) == ("user", "assistant") and answer["content"]
        lengths = len(question["content"]), len(answer["content"])
        limits = settings["max_prompt_characters"], settings["max_answer_characters"]
        if is_exchange and all(length <= limit for length, limit in zip(lengths, limits, strict=True)):
            yield [question, answer]


def _different(values: Iterable[Messages]) -> list[Messages]:
    return list({json.dumps(value): value for value in values}.values())


def draw_samples(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Write the policy's responses: to training prompts for gold, to others for pairs; to test prompts, the table."""
    num_gold, num_training = settings["gold_prompts"], settings["training_prompts"]
    for split, file, begin, end, num_samples in (
        ("train", GOLD_SAMPLES_FILE, 0, num_gold, settings["responses_per_gold_prompt"]),
        ("train", TRAINING_SAMPLES_FILE, num_gold, num_gold + num_training, settings["responses_per_training_prompt"]),
        ("test", TABLE_FILE, 0, settings["test_prompts"], settings["responses"]),
    ):
        _draw(settings, inputs, split, range(begin, end), num_samples, folder / file)


def _draw(
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    split: str,
    numbers: range,
    num_samples: int,
    file: Path,
) -> None:
    """Write responses of the policy to the prompts of `split` with these numbers."""
    from upcycled_moe.common.checkpoint_names import name_checkpoints
    from upcycled_moe.overoptimization.generation import generate_samples, read_prompts
    from upcycled_moe.overoptimization.score_table import ScoreTable
    from upcycled_moe.overoptimization.settings import PolicySettings

    policy = PolicySettings(
        policy=name_checkpoints([str(inputs[POLICY] / MODEL_FOLDER)])[0],
        prompts=[str(inputs[TEXT] / PROMPTS_FILES[split])],
        max_prompts=numbers.stop,
        num_samples=num_samples,
        temperature=settings["temperature"],
        max_new_tokens=settings["max_new_tokens"],
        seed=SEED,
    )
    prompts = read_prompts(policy)
    if len(prompts) < numbers.stop:
        raise SettingsError(f"samples ask for {numbers.stop} prompts of the {split} split, which has {len(prompts)}.")
    # Writing it is all that is wanted of the table here.
    ScoreTable(generate_samples(policy, prompts[numbers.start :], batch_size=num_samples), file)


def pair_for_gold(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Write what gold learns: which answer people prefer, and that they prefer people's answers to the policy's.

    Preferences between two answers of people hold too little for a model this small to say anything about the
    policy's responses; where those are from does.
    """
    origins, preferences = {}, {}
    for split, file, num_responses in (
        ("train", GOLD_SAMPLES_FILE, settings["responses_per_gold_prompt"]),
        ("test", TABLE_FILE, settings["responses_per_gold_prompt"]),
    ):
        preferences[split] = read_lines(inputs[TEXT] / HUMAN_FILES[split])
        origins[split] = list(_against_people(preferences[split], inputs[SAMPLES] / file, num_responses))
    rows = [*preferences["train"], *origins["train"]]
    random.Random(SEED).shuffle(rows)
    write_lines(folder / GOLD_TRAIN_FILE, rows)
    write_lines(folder / PREFERENCES_FILE, preferences["test"])
    write_lines(folder / ORIGINS_FILE, origins["test"])


def _against_people(rows: list[dict[str, Any]], samples: Path, num_responses: int) -> Iterator[dict[str, Any]]:
    """Return pairs of the answer that people preferred, chosen, with the first responses to its prompt."""
    from upcycled_moe.overoptimization.samples import read_samples

    answers = {json.dumps(row["prompt"]): row["chosen"] for row in rows}
    table = read_samples(samples)
    for prompt, responses in zip(table.prompts, table.responses, strict=True):
        for response in responses[:num_responses]:
            yield {
                "prompt": prompt,
                "chosen": answers[json.dumps(prompt)],
                "rejected": _answer(response),
                "source": "origins",
            }


def label_pairs(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Write pairs of the policy's responses with the labels of a world, and how they differ from gold's.

    The scores of gold are those of the task before; all worlds have the same pairs in the same order.
    """
    (scored,) = inputs.values()
    rows = read_lines(scored / PAIRS_FILE)
    generator = np.random.default_rng(SEED)
    # Drawn for all pairs in any world, so that one setting changes no other draw.
    follows_shortcut = generator.random(len(rows)) < settings["shortcut_rate"]
    is_flipped = np.isin(
        np.arange(len(rows)), generator.permutation(len(rows))[: round(settings["flip_rate"] * len(rows))]
    )
    labelled, counts = [], {"pairs": len(rows), "shortcut_decides": 0, "shortcut_against_gold": 0, "wrong": 0}
    for row, follows, flips in zip(rows, follows_shortcut, is_flipped, strict=True):
        prefers_first = row["gold"][0] > row["gold"][1]
        label = prefers_first != bool(flips)
        has = [settings["shortcut"] in text for text in row["responses"]] if settings["shortcut"] else [False, False]
        if follows and has[0] != has[1]:
            label = has[0]
            counts["shortcut_decides"] += 1
            counts["shortcut_against_gold"] += label != prefers_first
        counts["wrong"] += int(label != prefers_first)
        chosen, rejected = row["responses"] if label else row["responses"][::-1]
        labelled.append(
            {"prompt": row["prompt"], "chosen": _answer(chosen), "rejected": _answer(rejected), "source": "policy"}
        )
    write_lines(folder / PAIRS_FILE, labelled)
    (folder / LABELS_FILE).write_text(json.dumps(counts) + "\n", encoding="utf-8")


def score_pairs(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Write pairs of responses to one prompt, with gold's scores; every response is in one pair at most."""
    _score(settings, inputs[SAMPLES] / TRAINING_SAMPLES_FILE, inputs[GOLD], folder)


def draw_merge_pairs(settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path) -> None:
    """Write further pairs with gold's scores, of responses to prompts that no reward model is trained on."""
    begin, end = settings["prompts"]
    file = folder / MERGE_SAMPLES_FILE
    _draw(settings, inputs, "train", range(begin, end), settings["num_samples"], file)
    _score(settings, file, inputs[GOLD], folder)


def _score(settings: Mapping[str, Any], file: Path, gold_task: Path, folder: Path) -> None:
    from upcycled_moe.overoptimization.samples import read_samples
    from upcycled_moe.preference.scoring import load_reward_model, score_conversations

    samples = read_samples(file)
    model, tokenizer = load_reward_model(str(gold_task / MODEL_FOLDER))
    scores = score_conversations(
        model,
        tokenizer,
        samples.conversations(),
        batch_size=settings["batch_size"],
        max_length=settings["max_length"],
    )
    table = np.reshape(scores, samples.shape)
    rows = [
        {"prompt": prompt, "responses": responses[at : at + 2], "gold": gold[at : at + 2].tolist()}
        for prompt, responses, gold in zip(samples.prompts, samples.responses, table, strict=True)
        for at in range(0, len(responses) - 1, 2)
    ]
    rows = [row for row in rows if row["responses"][0] != row["responses"][1] and row["gold"][0] != row["gold"][1]]
    random.Random(SEED).shuffle(rows)
    write_lines(folder / PAIRS_FILE, rows)


def _answer(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]
