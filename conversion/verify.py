"""Does the MoE checkpoint compute what its dense parent computes? Both are loaded as a user would, and compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import has_file

from ..common.checkpoints import check_code, load_config, load_model, load_tokenizer
from ..common.companions import TOKENIZER_FILES
from ..common.devices import best_device
from ..common.settings import SettingsError
from ..common.tokenizers import tokenizer_difference
from .randomness import tensor_generator


# Largest difference of logits of order one that float32 rounding explains: seen 2e-7 to 2e-6 on models of 3 layers, 64
# wide, without outliers. Larger logits round in proportion.
ABSOLUTE_TOLERANCE = 5e-6

# Rounding of the dense model at a position is the largest of so many runs, and so many times that is allowed there.
# On models of 6 layers, 128 wide, with activations of 20 to 300,000, right conversions were at most 10 times it off,
# and ones with one expert matrix that is wrong by 1 % 500 times or more.
NUM_ROUNDING_RUNS = 4
ROUNDING_FACTOR = 20.0

# Allowing more than this share of the largest logit for rounding is worth a word.
NOTABLE_SHARE = 1e-3


@dataclass(frozen=True)
class VerifyReport:
    """How far the logits of two models are apart, and whether their tokenizers are.

    Args:
        max_difference: largest |Δlogit|.
        max_logit: largest |logit| of the dense model.
        rounding_noise: largest |Δlogit| between two ways to compute the dense model that differ by rounding alone.
        tolerance: what |Δlogit| may be at any position: 5e-6, times `max_logit` where that is above one.
        max_allowed: what it may be at the position with the most noise: `tolerance`, or 20 times the noise there.
        difference_to_allowed: largest ratio of |Δlogit| to what is allowed at its position; equal up to one.
        argmax_agreement: share of positions whose most probable token is the same.
        num_positions: positions compared.
        tokenizer_difference: where the tokenizers differ, in words; None if nowhere, or if one of the two has none.
    """

    max_difference: float
    max_logit: float
    rounding_noise: float
    tolerance: float
    max_allowed: float
    difference_to_allowed: float
    argmax_agreement: float
    num_positions: int
    dtype: str
    tokenizer_difference: str | None

    @property
    def has_equal_logits(self) -> bool:
        """Whether the difference is within what is allowed, at every position."""
        return self.difference_to_allowed <= 1

    @property
    def equal(self) -> bool:
        """Whether neither logits nor tokenizers differ."""
        return self.has_equal_logits and self.tokenizer_difference is None

    @property
    def is_limited_by_rounding(self) -> bool:
        """Whether rounding can hide differences that someone might care about."""
        return self.max_allowed > max(self.tolerance, NOTABLE_SHARE * max(1.0, self.max_logit))

    def to_dict(self) -> dict[str, Any]:
        """Return the report for `--json`."""
        return asdict(self) | {"equal": self.equal, "is_limited_by_rounding": self.is_limited_by_rounding}


def verify(
    dense: str,
    moe: str,
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float | None = None,
    num_sequences: int = 4,
    sequence_length: int = 128,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Compare the logits of `moe`, loaded with its own code, with those of `dense` on random tokens.

    In float32 by default, whatever the weights are stored in: then only the order of additions differs. How much that
    is depends on the model: activations in the thousands, as real ones have, amplify it. So the dense model also runs
    with each FFN as a mixture of two of itself, which is equal but rounds as the MoE does, and at each position 20
    times the difference that this makes is allowed, if that is more than 5e-6 of the largest logit. The constants were
    measured on tiny models, most with logits of order one. One model is in memory at a time.

    Where both have a tokenizer, these encode and decode a few short texts.

    Args:
        tolerance: largest |Δlogit| to allow instead, whatever the rounding.
        trust_remote_code: whether to run code that is downloaded; the code in a local folder runs without it.

    Raises:
        SettingsError: if one of them cannot be loaded, or they have different vocabularies, or code would be
            downloaded without leave.
    """
    for name, value in (("num_sequences", num_sequences), ("sequence_length", sequence_length)):
        if value < 1:
            raise SettingsError(f"{name}={value} must be at least 1.")
    check_code(moe, trust_remote_code=trust_remote_code)
    dense_config, moe_config = load_config(dense, own_code=False), load_config(moe)
    if dense_config.vocab_size != moe_config.vocab_size:
        raise SettingsError(
            f"{moe} has {moe_config.vocab_size} tokens, {dense} has {dense_config.vocab_size}: "
            "they cannot be parent and child."
        )
    different_tokens = _tokenizer_difference(dense, moe)
    generator = tensor_generator(seed, "verify")
    tokens = torch.randint(dense_config.vocab_size, (num_sequences, sequence_length), generator=generator)
    expected, noise = _dense_logits(dense, dense_config, tokens, dtype, generator)
    with _inference(moe, moe_config, dtype, own_code=True) as (_, run):
        actual = run(tokens)
    if actual.shape != expected.shape:
        raise SettingsError(f"{moe} gives logits {tuple(actual.shape)}, {dense} {tuple(expected.shape)}.")
    max_logit = expected.abs().max().item()
    difference = (actual - expected).abs().amax(-1)
    if tolerance is None:
        tolerance = ABSOLUTE_TOLERANCE * max(1.0, max_logit)
        allowed = (ROUNDING_FACTOR * noise).clamp(min=tolerance)
    else:
        allowed = torch.full_like(noise, tolerance)
    # Without a difference nothing need be allowed; what is no number stays none and is never equal.
    ratio = torch.where(difference == 0, 0.0, difference / allowed)
    return VerifyReport(
        max_difference=difference.max().item(),
        max_logit=max_logit,
        rounding_noise=noise.max().item(),
        tolerance=tolerance,
        max_allowed=allowed.max().item(),
        difference_to_allowed=ratio.max().item(),
        argmax_agreement=(actual.argmax(-1) == expected.argmax(-1)).double().mean().item(),
        num_positions=expected.shape[:-1].numel(),
        dtype=str(dtype).removeprefix("torch."),
        tokenizer_difference=different_tokens,
    )


def _tokenizer_difference(dense: str, moe: str) -> str | None:
    if not all(any(has_file(model, name) for name in TOKENIZER_FILES) for model in (dense, moe)):
        return None
    return tokenizer_difference(load_tokenizer(dense), load_tokenizer(moe))


def _dense_logits(
    dense: str, config: Any, tokens: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the dense model's logits and, for each position, how far rounding moves them."""
    with _inference(dense, config, dtype, own_code=False) as (model, run):
        logits = run(tokens)
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                module.forward = partial(_as_mixture, module.forward, generator)
        noise = [(run(tokens) - logits).abs().amax(-1) for _ in range(NUM_ROUNDING_RUNS)]
    return logits, torch.stack(noise).amax(0)


def _as_mixture(ffn: Callable[[Tensor], Tensor], generator: torch.Generator, hidden: Tensor) -> Tensor:
    """Return `ffn(hidden)` rounded as by a mixture of equal experts: each token in two groups, with random weights."""
    flat = hidden.flatten(0, -2)  # [T, H]
    outputs = []
    for _ in range(2):
        output = torch.empty_like(flat)
        for group in torch.randperm(len(flat), generator=generator).tensor_split(4):
            if len(group):
                group = group.to(flat.device)
                output[group] = ffn(flat[group])
        outputs.append(output)
    weight = torch.rand(len(flat), 1, generator=generator).to(flat)
    return (weight * outputs[0] + (1 - weight) * outputs[1]).view_as(hidden)


@contextmanager
def _inference(model_name: str, config: Any, dtype: torch.dtype, *, own_code: bool) -> Iterator[tuple]:
    """Load a model and give it, with a function that returns logits of tokens in float64 on the CPU."""
    device = best_device()
    model = load_model(model_name, config, dtype=dtype, device=device, own_code=own_code)

    def run(tokens: Tensor) -> Tensor:
        return torch.cat([model(row.unsqueeze(0).to(device)).logits.cpu().double() for row in tokens])

    with torch.inference_mode():
        yield model, run
