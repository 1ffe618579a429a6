"""Weights of a checkpoint back into a model that is being trained."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...common.settings import SettingsError


def load_weights(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Give `model` exactly the weights and saved buffers of `checkpoint`.

    Transformers' Trainer looks for the model's own names in the files, which are others where a class converts its
    weights as it saves them (one tensor per expert); it warns, and goes on with the weights of the start
    (huggingface/transformers#48805). The class itself reads what it has written.

    Raises:
        SettingsError: if the checkpoint lacks a weight of the model, or has others.
    """
    # Of several types the widest holds the values of all, which get their own back below.
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    saved, report = type(model).from_pretrained(
        checkpoint,
        config=copy.deepcopy(model.config),
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := report[kind]:
            shown = ", ".join(sorted(name if isinstance(name, str) else name[0] for name in names)[:3])
            raise SettingsError(
                f"{checkpoint}: {len(names)} {kind.replace('_keys', '')} weights for this {type(model).__name__} "
                f"({shown}); resume with the model that the checkpoint is of."
            )
    model.load_state_dict(saved.state_dict())
