"""Rounds of DPO, each held to a reference that is made of the policies before it.

Round t trains π_t from π_{t-1} on pairs of its own, with a reference ρ_t made of π_0 to π_{t-1}. Each stage of a round
writes one file or folder, whole or not at all, and reads what the stages before it wrote; a run that was stopped goes
on with the first one that is missing, so that it ends in the same weights.

    OUT/iterative_dpo.json                   settings that decide the result
    OUT/round-T/answers.parquet              what the policy before answers, with on-policy data
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
from collections.abc import Callable, Sequence
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
from ...common.settings import SettingsError
from ...common.streaming.fetch import locate
from ...preference.scoring import open_reward_model
from ...preference.template import Messages
from .cards import write_card_or_warn
from .dpo_arguments import IterativeDPOArguments
from .dpo_sampling import Sampling, answer_text, sample_answers, tell_unfinished, with_room
from .dpo_trainer import train_round
from .log_probabilities import AnswerScorer, TokenizedAnswers, tell_lengths, tokenize_answers
from .policies import check_policy, load_policy, load_tokenizer
from .processes import of_first_process
from .references import make_reference, reference_coefficients, reference_folder
from .rewards import score_answers
from .round_figures import pair_figures, sample_figures
from .round_pairs import best_and_worst, read_pair_sets, read_rows, write_rows
from .run_state import begin_run, input_digests


class Rounds:
    """A run of iterative DPO in a folder; all processes have one.

    Args:
        arguments: of the run.
        progress: told of what is done.

    Raises:
        SettingsError: if the folder holds a run with other settings, or something else, or what they name is missing
            or no reward model.
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
        check_policy(self.start, policy, self.tokenizer, self.training.max_length)
        for reward_model in {arguments.sampling.reward_model, arguments.sampling.eval_reward_model} - {None}:
            open_reward_model(reward_model)
        self.pairs = read_pair_sets(arguments, self.progress)
        self._scorer = AnswerScorer(
            self.tokenizer.pad_token_id,
            self.training.per_device_eval_batch_size,
            torch.bfloat16 if self.training.bf16 else None,
        )
        if self.state.is_main_process:
            inputs = input_digests(arguments, self.pairs, self.tokenizer, self.start)
            begin_run(self.folder, arguments, self.state.num_processes, inputs)
        self.state.wait_for_everyone()

    def run(self) -> list[dict[str, Any]]:
        """Do what is left of the rounds, and return the figures of all policies, π_0 first."""
        self._measure(0)
        for number in range(1, self.arguments.rounds.num_rounds + 1):
            for stage in (
                self._write_answers,
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
        return load_policy(folder, self.arguments.policy, self.training.device)

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
        on_policy = self.arguments.rounds.round_data == "on_policy"
        pairs = self._labelled_answers(number) if on_policy else self.pairs.rounds[number - 1]
        self._written(path, lambda partial: write_rows(pairs, partial))

    def _write_answers(self, number: int) -> None:
        path = self._round(number) / "answers.parquet"
        if self.arguments.rounds.round_data != "on_policy" or of_first_process(path.is_file):
            return
        settings, name = self.arguments.sampling, f"round {number}"
        prompts, tokens = self._with_room(self.pairs.rounds[number - 1]["prompt"], name, self.progress)
        self._tell(number, f"drawing {settings.samples_per_prompt} answers to each of {len(prompts):,} prompts")
        sampling = self._sampling(settings.samples_per_prompt, settings.temperature)
        answers = sample_answers(
            self._load(self.policy_folder(number - 1)),
            self.tokenizer,
            tokens,
            sampling,
            seed=seed_of(self.training.seed, "answers", number),
        )
        free_memory()
        tell_unfinished(
            self.tokenizer, [answer for drawn in answers for answer in drawn], sampling, name, self.progress
        )
        texts = [[answer_text(self.tokenizer, answer) for answer in drawn] for drawn in answers]
        rows = Dataset.from_dict({"prompt": prompts, "answers": texts})
        self._written(path, lambda partial: write_rows(rows, partial))

    def _labelled_answers(self, number: int) -> Dataset:
        settings = self.arguments.sampling
        drawn = read_rows(self._round(number) / "answers.parquet")
        prompts, texts = drawn["prompt"][:], drawn["answers"][:]
        rewards = score_answers(settings.reward_model, prompts, texts, settings.sampling_batch_size, self.progress)
        generator = torch.Generator().manual_seed(seed_of(self.training.seed, "label noise", number))
        pairs = best_and_worst(prompts, texts, rewards, self.arguments.pairs.flip_rate, generator)
        if not pairs:
            raise SettingsError(
                f"round {number}: none of {len(prompts):,} prompts has answers of different reward; raise "
                "samples_per_prompt, temperature or max_new_tokens, or give another reward_model, and another "
                "output_dir."
            )
        self._tell(number, f"{len(pairs):,} of {len(prompts):,} prompts have answers of different reward")
        return Dataset.from_list(pairs)

    def _sampling(self, num_samples: int, temperature: float) -> Sampling:
        settings = self.arguments.sampling
        return Sampling(num_samples, settings.max_new_tokens, temperature, settings.sampling_batch_size)

    def _with_room(self, prompts: Sequence[Messages], name: str, progress: Progress) -> tuple[list, list]:
        room = self.training.max_length - self.arguments.sampling.max_new_tokens
        return with_room(self.tokenizer, prompts, room, name, progress)

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

    def _scores(self, model: PreTrainedModel, pairs: TokenizedAnswers) -> dict[str, list[float]]:
        return {side: self._scorer(model, pairs.answers(f"{side}_ids")) for side in ("chosen", "rejected")}

    def _tokenized_pairs(self, number: int, tell: bool = False) -> TokenizedAnswers:
        path = self._round(number) / "pairs.parquet"
        pairs = tokenize_answers(read_rows(path), self.tokenizer, self.training.max_length, str(path))
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
                lambda partial: write_text(
                    partial, json.dumps(trained.log, indent=1, sort_keys=True, allow_nan=False) + "\n"
                ),
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
            write_card_or_warn(folder, before, self.progress)

    def _measure(self, number: int) -> None:
        path = self._round(number) / "figures.json"
        if of_first_process(path.is_file):
            return
        self._tell(number, "measuring the policy")
        pairs = tokenize_answers(self.pairs.evaluation, self.tokenizer, self.training.max_length, "eval_data")
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
        self._written(path, lambda partial: write_text(partial, json.dumps(figures, indent=1, allow_nan=False) + "\n"))

    def _measured_answers(self, model: PreTrainedModel, number: int) -> dict[str, Any]:
        settings = self.arguments.sampling
        chosen = self.pairs.evaluation.select(range(min(settings.eval_samples, len(self.pairs.evaluation))))["prompt"]
        prompts, tokens = self._with_room(chosen, "eval_data", self.progress if number == 0 else Progress())
        sampling = self._sampling(1, temperature=1.0)
        # The same seed in each round: policies that are alike answer alike.
        seed = seed_of(self.training.seed, "measured answers")
        answers = [answer for (answer,) in sample_answers(model, self.tokenizer, tokens, sampling, seed)]
        tell_unfinished(self.tokenizer, answers, sampling, f"round {number}: eval_data", self.progress)
        scores = self._scorer(model, answers)
        start = scores if number == 0 else self._scorer(self._load(self.start), answers)
        free_memory()
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
