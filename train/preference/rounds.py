"""Rounds of DPO, each held to a reference that is made of the policies before it.

Round t trains π_t from π_{t-1} on pairs of its own, with a reference ρ_t made of π_0 to π_{t-1}. Each stage of a round
writes one file or folder, whole or not at all, and reads what the stages before it wrote; a run that was stopped goes
on with the first one that is missing, so that it ends in the same weights.

    OUT/iterative_dpo.json                   settings that decide the result
    OUT/round-T/pairs.parquet                what the round trains on
    OUT/round-T/reference.json               what each policy counts in its reference
    OUT/round-T/reference/                   the reference as a checkpoint, unless it is one of the policies
    OUT/round-T/reference_log_probs.parquet  of these pairs under it, so that no second model is held in training
    OUT/round-T/training/                    checkpoints within the round, until its policy is there
    OUT/round-T/policy/                      π_T, a checkpoint
    OUT/round-T/figures.json                 what is measured of it
    OUT/rounds.jsonl, OUT/rounds.png         the figures of all rounds
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel

from ...common.devices import free_memory
from ...common.files import replacing, write_text
from ...common.output_folder import staged
from ...common.progress import Progress
from ...common.provenance import read_provenance, recorded_name, with_step, write_provenance
from ...common.seeds import seed_of
from ...common.streaming.fetch import locate
from ...common.text import first_line
from ...model_cards.card import write_card
from .dpo_arguments import IterativeDPOArguments
from .dpo_sampling import Sampling, answer_text, sample_answers
from .dpo_trainer import train_round
from .log_probabilities import Answer, AnswerScorer, TokenizedPairs, prompt_tokens, tell_lengths, tokenize_pairs
from .policies import load_policy, load_tokenizer
from .processes import of_first_process
from .references import make_reference, reference_coefficients, reference_folder
from .rewards import score_answers
from .round_figures import pair_figures, sample_figures
from .round_pairs import best_and_worst, read_pair_sets, read_rows, write_rows
from .run_state import begin_run


class Rounds:
    """A run of iterative DPO in a folder; all processes have one.

    Args:
        arguments: of the run.
        progress: told of what is done.

    Raises:
        SettingsError: if the folder holds a run with other settings, or something else.
    """

    def __init__(self, arguments: IterativeDPOArguments, progress: Progress):
        self.arguments = arguments
        self.training = arguments.training
        self.folder = Path(self.training.output_dir)
        self.state = PartialState()
        # What all processes do one of them tells.
        self.progress = progress if self.state.is_main_process else Progress()
        policy = arguments.policy
        self.start, self.revision = locate(policy.model_name_or_path, policy.model_revision)
        self.tokenizer = load_tokenizer(self.start, policy)
        self.pairs = read_pair_sets(arguments, self.progress)
        self._scorer = AnswerScorer(
            self.tokenizer.pad_token_id,
            self.training.per_device_eval_batch_size,
            torch.bfloat16 if self.training.bf16 else None,
        )
        if self.state.is_main_process:
            begin_run(self.folder, arguments, self.state.num_processes)
        self.state.wait_for_everyone()

    def run(self) -> list[dict[str, Any]]:
        """Do what is left of the rounds, and return the figures of all policies, π_0 first."""
        self._measure(0)
        for number in range(1, self.arguments.rounds.num_rounds + 1):
            for stage in (
                self._write_pairs,
                self._write_reference,
                self._write_reference_log_probs,
                self._train,
                self._measure,
            ):
                stage(number)
        return self.figures()

    def figures(self) -> list[dict[str, Any]]:
        """Return the figures of the policies so far."""
        files = (self._round(number) / "figures.json" for number in range(self.arguments.rounds.num_rounds + 1))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]

    def policy_folder(self, number: int) -> Path:
        """Return where π_number is, or will be."""
        return self.start if number == 0 else self._round(number) / "policy"

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def _load(self, folder: Path) -> PreTrainedModel:
        return load_policy(folder, self.arguments.policy, self.tokenizer, self.training.device)

    def _written(self, path: Path, write: Callable[[Path], None]) -> None:
        """Have the first process `write` the file `path`, whole or not at all, and all others wait for it."""
        if self.state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                write(partial)
        self.state.wait_for_everyone()

    def _write_pairs(self, number: int) -> None:
        path = self._round(number) / "pairs.parquet"
        if of_first_process(path.is_file):
            return
        pairs = self.pairs.rounds[number - 1]
        if self.arguments.rounds.round_data == "on_policy":
            pairs = self._drawn_pairs(number, [pair["prompt"] for pair in pairs])
        self._written(path, lambda partial: write_rows(pairs, partial))

    def _drawn_pairs(self, number: int, prompts: list[list[dict[str, str]]]) -> Dataset:
        settings = self.arguments.sampling
        self._tell(number, f"drawing {settings.samples_per_prompt} answers to each of {len(prompts):,} prompts")
        answers = self._sampled(
            self._load(self.policy_folder(number - 1)),
            prompts,
            settings.samples_per_prompt,
            settings.temperature,
            seed=seed_of(self.training.seed, "answers", number),
        )
        texts = [[answer_text(self.tokenizer, answer) for answer in drawn] for drawn in answers]
        rewards = score_answers(settings.reward_model, prompts, texts, settings.sampling_batch_size, self.progress)
        pairs = best_and_worst(
            prompts,
            texts,
            rewards,
            self.arguments.pairs.flip_rate,
            torch.Generator().manual_seed(seed_of(self.training.seed, "label noise", number)),
        )
        self._tell(number, f"{len(pairs):,} of the prompts have answers of different reward")
        return Dataset.from_list(pairs)

    def _sampled(
        self, model: PreTrainedModel, prompts: list, num_samples: int, temperature: float, seed: int
    ) -> list[list[Answer]]:
        settings = self.arguments.sampling
        sampling = Sampling(num_samples, settings.max_new_tokens, temperature, settings.sampling_batch_size)
        tokens = [prompt_tokens(self.tokenizer, prompt) for prompt in prompts]
        # What does not leave room for an answer loses its beginning.
        room = max(self.training.max_length - settings.max_new_tokens, 1)
        return sample_answers(model, self.tokenizer, [prompt[-room:] for prompt in tokens], sampling, seed)

    def _write_reference(self, number: int) -> None:
        # It serves for nothing else, and may have been deleted since.
        if of_first_process((self._round(number) / "reference_log_probs.parquet").is_file):
            return
        policies = [self.policy_folder(index) for index in range(number)]
        make_reference(
            self._round(number),
            policies,
            self.arguments,
            self.pairs.merge,
            self._load,
            self.tokenizer,
            self.state,
            self.progress,
        )

    def _write_reference_log_probs(self, number: int) -> None:
        path = self._round(number) / "reference_log_probs.parquet"
        if of_first_process(path.is_file):
            return
        self._tell(number, "scoring its pairs under the reference")
        policies = [self.policy_folder(index) for index in range(number)]
        scores = self._scores(
            self._load(reference_folder(self._round(number), policies)), self._tokenized_pairs(number, tell=True)
        )
        rows = Dataset.from_dict({f"ref_{side}_logps": values for side, values in scores.items()})
        self._written(path, lambda partial: write_rows(rows, partial))

    def _scores(self, model: PreTrainedModel, pairs: TokenizedPairs) -> dict[str, list[float]]:
        return {side: self._scorer(model, pairs.answers(f"{side}_ids")) for side in ("chosen", "rejected")}

    def _tokenized_pairs(self, number: int, tell: bool = False) -> TokenizedPairs:
        path = self._round(number) / "pairs.parquet"
        pairs = tokenize_pairs(read_rows(path), self.tokenizer, self.training.max_length, str(path))
        if tell:
            tell_lengths(pairs, self.training.max_length, str(path), self.progress)
        return pairs

    def _train(self, number: int) -> None:
        folder, training_folder = self.policy_folder(number), self._round(number) / "training"
        if not of_first_process(folder.is_dir):
            pairs = self._tokenized_pairs(number).rows
            scores = read_rows(self._round(number) / "reference_log_probs.parquet")
            for column in scores.column_names:
                pairs = pairs.add_column(column, scores[column][:])
            self._tell(number, f"training on {len(pairs):,} pairs")
            model = self._load(self.policy_folder(number - 1))
            use_cache = model.config.use_cache
            trained = train_round(
                model,
                self.tokenizer,
                pairs,
                self.training,
                training_folder,
                seed=seed_of(self.training.seed, "training", number),
                name=f"round {number}",
            )
            model.config.use_cache = use_cache
            self._written(
                self._round(number) / "training_log.json",
                lambda partial: write_text(partial, json.dumps(trained.log, indent=1, sort_keys=True) + "\n"),
            )
            if self.state.is_main_process:
                self._save_policy(model, number, len(pairs), trained.num_steps)
            # A trainer and its model hold each other, and stay until they are looked for.
            del model
            free_memory()
        if self.state.is_main_process:
            shutil.rmtree(training_folder, ignore_errors=True)
        self.state.wait_for_everyone()

    def _save_policy(self, model: PreTrainedModel, number: int, num_pairs: int, num_steps: int) -> None:
        before, name = self.policy_folder(number - 1), self.arguments.policy.model_name_or_path
        settings = self.arguments
        with staged(self.policy_folder(number)) as folder:
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            step = {
                "round": number,
                "reference": settings.rounds.reference,
                "steps": num_steps,
                "pairs": num_pairs,
                "beta": self.training.beta,
                "learning_rate": self.training.learning_rate,
            }
            if number == 1:
                step["source"] = {"name": recorded_name(name, self.start), "revision": self.revision}
            write_provenance(folder, with_step(read_provenance(before), "iterative_dpo", **step))
            self._write_card(folder, before)

    def _write_card(self, folder: Path, before: Path) -> None:
        try:
            write_card(folder, before)
        # Whatever it is: a round of training is not lost for a card.
        except Exception as error:
            self.progress.warn(f"{folder.name}: no card is written ({first_line(error)}).")

    def _measure(self, number: int) -> None:
        path = self._round(number) / "figures.json"
        if of_first_process(path.is_file):
            return
        self._tell(number, "measuring the policy")
        pairs = tokenize_pairs(self.pairs.evaluation, self.tokenizer, self.training.max_length, "eval_data")
        if number == 0:
            tell_lengths(pairs, self.training.max_length, "eval_data", self.progress)
        model = self._load(self.policy_folder(number))
        scores = self._scores(model, pairs)
        self._written(
            self._round(number) / "eval_log_probs.parquet",
            lambda partial: write_rows(Dataset.from_dict(scores), partial),
        )
        start = read_rows(self._round(0) / "eval_log_probs.parquet").to_dict()
        figures = {
            "round": number,
            "reference_coefficients": None if number == 0 else reference_coefficients(self._round(number)),
            **pair_figures(scores, start, pairs.rows["source"], self.training.beta),
            **(self._measured_answers(model, number) if self.arguments.sampling.eval_samples else {}),
        }
        self._written(path, lambda partial: write_text(partial, json.dumps(figures, indent=1) + "\n"))

    def _measured_answers(self, model: PreTrainedModel, number: int) -> dict[str, Any]:
        settings = self.arguments.sampling
        prompts = self.pairs.evaluation.select(range(min(settings.eval_samples, len(self.pairs.evaluation))))["prompt"]
        # The same seed in each round: policies that are alike answer alike.
        drawn = self._sampled(model, prompts, 1, temperature=1.0, seed=seed_of(self.training.seed, "measured answers"))
        answers = [answer for (answer,) in drawn]
        scores = self._scorer(model, answers)
        start = scores if number == 0 else self._scorer(self._load(self.start), answers)
        rewards = None
        texts = [[answer_text(self.tokenizer, answer)] for answer in answers]
        if settings.eval_reward_model is not None:
            scored = score_answers(
                settings.eval_reward_model, prompts, texts, settings.sampling_batch_size, self.progress
            )
            rewards = [reward for (reward,) in scored]
        rows = {"prompt": prompts, "answer": [text for (text,) in texts], "log_prob": scores, "start_log_prob": start}
        self._written(
            self._round(number) / "eval_answers.parquet",
            lambda partial: write_rows(Dataset.from_dict(rows | ({"reward": rewards} if rewards else {})), partial),
        )
        return sample_figures(scores, start, [len(answer.answer) for answer in answers], rewards)

    def _tell(self, number: int, message: str) -> None:
        self.progress.tell(f"round {number}: {message}")
