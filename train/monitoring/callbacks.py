"""What the Trainer shows while it runs."""

from transformers import PrinterCallback, ProgressCallback, Trainer


# Figures of single layers, groups and sources of pairs, for the log file and TensorBoard only.
LONG_LOG = ("router/layer_", "grad_norm/", "eval_source/")


class _ShortLog:
    """Leaves out `LONG_LOG`."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        short = {name: value for name, value in (logs or {}).items() if not name.startswith(LONG_LOG)}
        super().on_log(args, state, control, logs=short, **kwargs)


class ShortProgressCallback(_ShortLog, ProgressCallback):
    """A progress bar with loss and speed, and a line at each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs and "tokens_per_second" in logs:
            shown = {"loss": f"{logs['loss']:.3f}", "tokens/s": f"{logs['tokens_per_second']:,.0f}"}
            self.training_bar.set_postfix(shown, refresh=False)


class ShortPrinterCallback(_ShortLog, PrinterCallback):
    """A line at each log."""


def shorten_console_log(trainer: Trainer) -> None:
    """Let `trainer` print a line that fits on the screen at each log."""
    for callback, short in ((ProgressCallback, ShortProgressCallback), (PrinterCallback, ShortPrinterCallback)):
        if trainer.pop_callback(callback) is not None:
            trainer.add_callback(short)
