"""Does the MoE checkpoint compute what its dense parent computes? Both are loaded as a user would, and compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..common.settings import SettingsError
from .calibration import best_device
from .routers import tensor_generator


# Largest difference of logits of order one that float32 rounding explains; seen: 2e-7 to 2e-6.
ABSOLUTE_TOLERANCE = 5e-6


@dataclass(frozen=True)
class VerifyReport:
    """How far the logits of two models are apart.

    Args:
        max_difference: largest |Δlogit|.
        max_logit: largest |logit| of the dense model.
        tolerance: what `max_difference` may be: 5e-6, times `max_logit` where that is above one.
        argmax_agreement: share of positions whose most probable token is the same.
        num_positions: positions compared.
    """

    max_difference: float
    max_logit: float
    tolerance: float
    argmax_agreement: float
    num_positions: int
    dtype: str

    @property
    def equal(self) -> bool:
        """Whether the difference is within tolerance."""
        return self.max_difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the report for `--json`."""
        return asdict(self) | {"equal": self.equal}


def verify(
    dense: str,
    moe: str,
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float | None = None,
    num_sequences: int = 4,
    sequence_length: int = 128,
    seed: int = 0,
) -> VerifyReport:
    """Compare the logits of `moe`, loaded with its own code, with those of `dense` on random tokens.

    In float32 by default, whatever the weights are stored in: then only the order of additions differs. One model is
    in memory at a time.

    Raises:
        SettingsError: if one of them cannot be loaded, or they have different vocabularies.
    """
    for name, value in (("num_sequences", num_sequences), ("sequence_length", sequence_length)):
        if value < 1:
            raise SettingsError(f"{name}={value} must be at least 1.")
    dense_config, moe_config = _config(dense, own_code=False), _config(moe, own_code=True)
    if dense_config.vocab_size != moe_config.vocab_size:
        raise SettingsError(
            f"{moe} has {moe_config.vocab_size} tokens, {dense} has {dense_config.vocab_size}: "
            "they cannot be parent and child."
        )
    generator = tensor_generator(seed, "verify")
    tokens = torch.randint(dense_config.vocab_size, (num_sequences, sequence_length), generator=generator)
    expected = _logits(dense, dense_config, tokens, dtype, own_code=False)
    actual = _logits(moe, moe_config, tokens, dtype, own_code=True)
    if actual.shape != expected.shape:
        raise SettingsError(f"{moe} gives logits {tuple(actual.shape)}, {dense} {tuple(expected.shape)}.")
    max_logit = expected.abs().max().item()
    return VerifyReport(
        max_difference=(actual - expected).abs().max().item(),
        max_logit=max_logit,
        tolerance=ABSOLUTE_TOLERANCE * max(1.0, max_logit) if tolerance is None else tolerance,
        argmax_agreement=(actual.argmax(-1) == expected.argmax(-1)).double().mean().item(),
        num_positions=expected.shape[:-1].numel(),
        dtype=str(dtype).removeprefix("torch."),
    )


def _config(model: str, *, own_code: bool):
    if Path(model).is_dir() and not (Path(model) / "config.json").exists():
        raise SettingsError(f"{model}: there is no config.json; give the folder of a finished checkpoint.")
    with _loading(model):
        return _auto_class("AutoConfig", model, own_code).from_pretrained(model)


@torch.inference_mode()
def _logits(model_name: str, config, tokens: Tensor, dtype: torch.dtype, *, own_code: bool) -> Tensor:
    """Return the logits of `tokens`, one sequence at a time, in float32 on the CPU."""
    is_classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    auto_name = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    device = best_device()
    with _loading(model_name):
        auto_class = _auto_class(auto_name, model_name, own_code)
        model = auto_class.from_pretrained(model_name, config=config, dtype=dtype).eval().to(device)
    return torch.cat([model(row.unsqueeze(0).to(device)).logits.float().cpu() for row in tokens])


def _auto_class(name: str, model: str, own_code: bool) -> type:
    """Return the class that loads `model`: from the code beside its weights, or the Auto class `name`.

    The Auto classes themselves prefer a class that this process has registered over that code.
    """
    auto_map = PreTrainedConfig.get_config_dict(model)[0].get("auto_map", {}) if own_code else {}
    return get_class_from_dynamic_module(auto_map[name], model) if name in auto_map else getattr(transformers, name)


@contextmanager
def _loading(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise SettingsError(f"{model}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error
