"""What the reference of a round is made of: the policies before it, and what each of them counts.

Dimensions: K policies of the trajectory, π_0 to π_{K-1}.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...common.devices import free_memory
from ...common.files import replacing, write_text
from ...common.learned_merge.checkpoints import open_checkpoints, write_merged
from ...common.learned_merge.merge import LearnedMerge
from ...common.pictures import can_draw
from ...common.progress import Progress
from ...common.seeds import seed_of
from ...preference.fit_plot import plot_fit
from ...preference.fit_record import FitRecord
from ...preference.fitting import fit_coefficients
from ...preference.settings import FitSettings
from .cards import write_card_or_warn
from .dpo_arguments import IterativeDPOArguments
from .processes import of_first_process


def last_coefficients(num_policies: int, decay: float) -> list[float]:
    """Return [K] for the last policy alone, as usual in iterative DPO."""
    return [0.0] * (num_policies - 1) + [1.0]


def uniform_coefficients(num_policies: int, decay: float) -> list[float]:
    """Return [K] for the mean of all policies."""
    return [1 / num_policies] * num_policies


def ema_coefficients(num_policies: int, decay: float) -> list[float]:
    """Return [K] for `ρ_t = decay ρ_{t-1} + (1 - decay) π_{t-1}`, with `ρ_1 = π_0`."""
    newer = [(1 - decay) * decay ** (num_policies - 1 - index) for index in range(1, num_policies)]
    return [decay ** (num_policies - 1), *newer]


# References whose coefficients nothing has to be measured for.
FIXED_REFERENCES: dict[str, Callable[[int, float], list[float]]] = {
    "last": last_coefficients,
    "uniform": uniform_coefficients,
    "ema": ema_coefficients,
}


def only_policy(coefficients: Mapping[str, Sequence[float]]) -> int | None:
    """Return the index of the policy that counts alone in all groups [K], or None if several do."""
    counting = {index for values in coefficients.values() for index, value in enumerate(values) if value}
    return counting.pop() if len(counting) == 1 else None


REFERENCE_FILE = "reference.json"


def make_reference(
    round_folder: Path,
    policies: Sequence[Path],
    arguments: IterativeDPOArguments,
    pairs: Dataset | None,
    load: Callable[[Path], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    state: PartialState,
    progress: Progress,
) -> None:
    """Write what each of `policies` counts in the reference of a round, and the reference where it is none of them.

    Args:
        round_folder: of the round.
        policies: π_0 to the last one.
        pairs: to learn from, for a learned one.
        load: gives the model of a folder.
    """
    file, folder = round_folder / REFERENCE_FILE, round_folder / "reference"
    if not of_first_process(file.is_file):
        kind, decay = arguments.rounds.reference, arguments.rounds.ema_decay
        result: dict[str, Any] = {"reference": kind}
        if len(policies) == 1:
            result["coefficients"] = {"model": [1.0]}
        elif kind in FIXED_REFERENCES:
            result["coefficients"] = {"model": FIXED_REFERENCES[kind](len(policies), decay)}
        else:
            with _on_disk(pairs, round_folder / "merge_pairs", state) as shared:
                record = _learned(policies, arguments, shared, load, tokenizer, progress)
            free_memory()
            result |= {"coefficients": dict(record.final), "fit": record.to_dict()}
            if state.is_main_process and can_draw():
                plot_fit(record, round_folder / "reference.png")
        if state.is_main_process:
            round_folder.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                write_text(partial, json.dumps(result, indent=1) + "\n")
        state.wait_for_everyone()
    coefficients = reference_coefficients(round_folder)
    if state.is_main_process and only_policy(coefficients) is None and not folder.is_dir():
        series = open_checkpoints([str(policy) for policy in policies])
        write_merged(
            series,
            coefficients,
            folder,
            progress=progress,
            finish=lambda made, source: write_card_or_warn(made, source, progress),
        )
    state.wait_for_everyone()


def reference_folder(round_folder: Path, policies: Sequence[Path]) -> Path:
    """Return where the reference of a round is that has been made."""
    alone = only_policy(reference_coefficients(round_folder))
    return round_folder / "reference" if alone is None else policies[alone]


def reference_coefficients(round_folder: Path) -> dict[str, list[float]]:
    """Return what each policy counts [K] in the reference of a round, by group of weights."""
    return json.loads((round_folder / REFERENCE_FILE).read_text(encoding="utf-8"))["coefficients"]


@contextmanager
def _on_disk(pairs: Dataset, folder: Path, state: PartialState) -> Iterator[Dataset]:
    """Give `pairs` in files beside which trl's processes find what the first of them has computed."""
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        pairs.save_to_disk(folder)
    state.wait_for_everyone()
    yield Dataset.load_from_disk(folder)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder)


def _learned(
    policies: Sequence[Path],
    arguments: IterativeDPOArguments,
    pairs: Dataset,
    load: Callable[[Path], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> FitRecord:
    """Learn what each of `policies` counts in a merge that prefers the chosen answers, with π_0 as DPO's reference.

    Source: TPMM-DPO (arXiv 2605.23398) learns weights on preferences; by which loss is our reading.
    """
    merge, training = arguments.merge, arguments.training
    initial = uniform_coefficients(len(policies), 0.0)
    model = load(policies[-1])
    series = open_checkpoints([str(policy) for policy in policies])
    learned = LearnedMerge(model, series.groups(initial, merge.merge_per))
    settings = FitSettings(
        loss="dpo",
        learning_rate=merge.merge_learning_rate,
        max_steps=merge.merge_max_steps,
        batch_size=merge.merge_batch_size,
        max_length=training.max_length,
        beta=training.beta,
        gradient_checkpointing=training.gradient_checkpointing,
        # The same in every round: references are measured on the same pairs.
        seed=seed_of(training.seed, "reference"),
    )
    return fit_coefficients(learned, model, tokenizer, pairs, settings, reference=load(policies[0]), progress=progress)
