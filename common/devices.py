"""Where to compute, and telling a full memory from other failures."""

import gc

import torch


def best_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def free_memory() -> None:
    """Give back the memory of models that are not in use any more."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that the accelerator's memory, or the machine's, is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator, and an accelerator whose driver refuses, raise a bare RuntimeError.
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory")
    )
