"""Checkpoints and the final model of a run, which are there whole or not at all, and going on from them."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ...common.numbers import format_bytes
from ..engines import shards_at_load
from ..errors import RunEnded, RunError
from ..messages import warn
from .checkpoints import (
    CONFIG_FILE,
    SKIPPED_FILE,
    checkpoint_before_skipped,
    checkpoint_folders,
    num_skipped_before,
)
from .disk_space import space_warning
from .resuming import load_weights
from .signals import StopSignals
from .staging import (
    MODEL_FOLDER,
    STAGING_FOLDER,
    clear_leftovers,
    discard,
    is_failed_write,
    keep_newest,
    publish_folder,
    publish_model,
)


class SavingMixin:
    """Saves such that a run can be killed at any time, stops when a scheduler asks, and resumes with all weights.

    Everything is written into a folder of its own, brought to the disk, and then moved to its name; older checkpoints
    are removed after that, but none of a later step, and none while steps are left out: the weights may be ruined, and
    older ones what is needed. A run that ends so fails. Callbacks with a method `on_checkpoint(args, state, folder)`
    add what they keep; those with `on_model(args, state, folder)` add to a whole model that was saved.
    """

    way_to_go_on = "continue with the same command and resume_from_checkpoint=last"

    def __init__(self, model=None, *args, **kwargs):
        # The Trainer sets that of the model to its own.
        self._use_cache_at_start = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(model, *args, **kwargs)

    def set_up_saving(self) -> None:
        """Prepare to save and to be stopped; after the Trainer's own set-up."""
        self._is_checkpointing = False
        self._stop_signals = StopSignals()
        self._stopped_by = 0
        self.add_callback(_StopCallback(self))

    def train(self, resume_from_checkpoint: str | None = None, *args, **kwargs):
        """As in [`Trainer`]; from a checkpoint of the last step nothing is trained, and the model is that one.

        Raises:
            RunEnded: if a signal asked to stop; a checkpoint of the last step stands.
            RunError: if the last step was left out for want of a finite gradient.
        """
        if resume_from_checkpoint is not None:
            self.num_skipped_in_a_row = num_skipped_before(resume_from_checkpoint)
        if self.args.should_save:
            output_dir = Path(self.args.output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            clear_leftovers(output_dir)
            # It says that a run is finished.
            (output_dir / TRAINER_STATE_NAME).unlink(missing_ok=True)
            if warning := space_warning(self.args, self.model, resume_from_checkpoint):
                warn(warning)
        with self._stop_signals.listening():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._stopped_by:
            self.accelerator.end_training()
            raise RunEnded(128 + self._stopped_by, self._farewell())
        if self.num_skipped_in_a_row:
            self.accelerator.end_training()
            raise RunError(self._end_in_skipped_steps())
        return output

    def _end_in_skipped_steps(self) -> str:
        num_skipped, step = self.num_skipped_in_a_row, self.state.global_step
        folder = checkpoint_before_skipped(self.args.output_dir, step, num_skipped)
        way_on = "begin anew" if folder is None else f"continue from resume_from_checkpoint={folder}"
        return (
            f"the last {num_skipped} of {step} steps were left out, as their gradients were not finite, so no final "
            f"model is saved; {way_on}, with a lower learning_rate."
        )

    def _farewell(self) -> str:
        name, step = signal.Signals(self._stopped_by).name, self.state.global_step
        way_on = (
            "save_only_model=true keeps no optimizer to go on with" if self.args.save_only_model else self.way_to_go_on
        )
        folder = Path(self.args.output_dir, f"checkpoint-{step}")
        return f"stopped by {name} after step {step} of {self.state.max_steps}; {folder} is saved, {way_on}."

    def _run_epoch(self, *args, **kwargs) -> None:
        # The Trainer would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def stop_if_asked(self) -> bool:
        """Return whether any process was asked to stop; all have the same answer and remember it."""
        received = self._stop_signals.received
        if self.args.world_size > 1:
            numbers = torch.tensor(received, device=self.args.device)
            distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
            received = int(numbers)
        self._stopped_by = received
        return bool(received)

    def _get_output_dir(self, trial) -> str:
        output_dir = super()._get_output_dir(trial)
        return os.path.join(output_dir, STAGING_FOLDER) if self._is_checkpointing else output_dir

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        with self.not_timed(), self._staged(run_dir / STAGING_FOLDER / folder.name) as staged:
            self._is_checkpointing = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_checkpointing = False
            self._note_best_checkpoint(folder)
            self._add_to_checkpoint(staged)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_folder(staged, folder)
        if self.args.should_save and self.args.save_total_limit and not self.num_skipped_in_a_row:
            protected = {folder, Path(self.state.best_model_checkpoint or folder)}
            folders = checkpoint_folders(run_dir, last_step=self.state.global_step)
            keep_newest(folders, self.args.save_total_limit, protected)
        self.accelerator.wait_for_everyone()

    def _note_best_checkpoint(self, folder: Path) -> None:
        """Remember the path of the best checkpoint, which may be the one that will be in `folder`."""
        if self.state.best_global_step:
            best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _add_to_checkpoint(self, staged: Path) -> None:
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_checkpoint"):
                callback.on_checkpoint(self.args, self.state, staged)
        if not self.args.should_save:
            return
        self.state.save_to_json(staged / TRAINER_STATE_NAME)
        if self.num_skipped_in_a_row:
            (staged / SKIPPED_FILE).write_text(json.dumps(self.num_skipped_in_a_row), encoding="utf-8")
        settings = Path(self.args.output_dir, CONFIG_FILE)
        if settings.is_file():
            shutil.copyfile(settings, staged / CONFIG_FILE)

    @contextmanager
    def _staged(self, folder: Path) -> Iterator[Path]:
        """Yield an empty `folder` for all processes to write to; if that fails, nothing is left of it.

        Raises:
            RunError: if it cannot be written to.
        """
        try:
            if self.args.should_save:
                discard(folder)
                folder.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            yield folder
        except BaseException as error:
            free = shutil.disk_usage(self.args.output_dir).free
            if self.args.should_save:
                discard(folder)
            if not is_failed_write(error):
                raise
            reason = error if isinstance(error, OSError) else str(error).splitlines()[0]
            raise RunError(
                f"{folder.name} could not be written to {self.args.output_dir} ({reason}; {format_bytes(free)} were "
                "free). Older checkpoints are whole; remove some of them or free other space, and continue with "
                "resume_from_checkpoint=last."
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in [`Trainer`]; outside of checkpoints unsharded and with the Trainer's state, all of it or nothing."""
        if self._is_checkpointing:
            return super().save_model(output_dir, _internal_call)
        final = Path(output_dir or self.args.output_dir)
        with self._staged(final / STAGING_FOLDER / MODEL_FOLDER) as staged:
            with self._unsharded():
                super().save_model(str(staged), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(staged / TRAINER_STATE_NAME)
                publish_model(final)
        if self.args.should_save:
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "on_model"):
                    callback.on_model(self.args, self.state, final)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        config = getattr(self.model, "config", None)
        if self._use_cache_at_start is None:
            return super()._save(output_dir, state_dict)
        in_training, config.use_cache = config.use_cache, self._use_cache_at_start
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.use_cache = in_training

    @contextmanager
    def _unsharded(self) -> Iterator[None]:
        """Let FSDP gather what is saved; with sharded states the Trainer writes no model at all."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            yield
            return
        kind = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        yield
        plugin.set_state_dict_type(kind)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_whole_weights():
            load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._loads_whole_weights():
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _loads_whole_weights(self) -> bool:
        """Return whether each process loads all weights; sharded engines have formats of their own."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or shards_at_load(self.args)
        return not is_sharded and isinstance(self.model, PreTrainedModel)


class _StopCallback(TrainerCallback):
    """Ends training after a step with a checkpoint, where a signal asked for it."""

    def __init__(self, trainer: SavingMixin):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.stop_if_asked():
            control.should_save = control.should_training_stop = True
            # The time that is left is for the checkpoint.
            control.should_evaluate = False
        return control
