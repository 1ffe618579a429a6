"""What the Trainer shows while it runs."""

from transformers import PrinterCallback, ProgressCallback, Trainer


class _ShortLog:
    """Leaves the figures of single layers to the log file and to TensorBoard."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        short = {name: value for name, value in (logs or {}).items() if not name.startswith("router/layer_")}
        super().on_log(args, state, control, logs=short, **kwargs)


class ShortProgressCallback(_ShortLog, ProgressCallback):
    """A progress bar, and a line at each log."""


class ShortPrinterCallback(_ShortLog, PrinterCallback):
    """A line at each log."""


def shorten_console_log(trainer: Trainer) -> None:
    """Let `trainer` print a line that fits on the screen at each log."""
    for callback, short in ((ProgressCallback, ShortProgressCallback), (PrinterCallback, ShortPrinterCallback)):
        if trainer.pop_callback(callback) is not None:
            trainer.add_callback(short)
