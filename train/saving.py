"""Checkpoints of a run."""


class SavingMixin:
    """Saves checkpoints."""

    def _save_checkpoint(self, *args, **kwargs):
        with self.not_timed():
            return super()._save_checkpoint(*args, **kwargs)
