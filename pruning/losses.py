"""The loss of a model on held-out text, before and after."""

import math
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.labelled_text import Block
from ..common.perplexity import domain_loss, measure_perplexity
from ..common.progress import Progress
from ..common.settings import SettingsError
from .results import Losses


def measure_losses(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Mapping[str, Sequence[Block]],
    batch_size: int,
    progress: Progress,
) -> Losses:
    """Return the loss of `model` on each domain and over all of them.

    Raises:
        SettingsError: if it is not finite.
    """
    with progress.task(f"Loss of {name}", sum(map(len, domains.values())), "blocks") as advance:
        found = measure_perplexity(model, tokenizer, domains, batch_size, advance=advance)
    overall = domain_loss(
        torch.cat([text.losses for text in found.values()]),
        torch.cat([text.counts for text in found.values()]),
        sum(text.num_bytes for text in found.values()),
    )
    if not math.isfinite(overall.loss):
        raise SettingsError(
            f"{name}: its loss is not finite; its weights are broken, or too large for its dtype (try --dtype "
            "float32)."
        )
    return Losses(overall, {domain: text.mean() for domain, text in found.items()})


def domains_in_common(first: Mapping[str, Sequence[Block]], second: Mapping[str, Sequence[Block]]) -> list[str]:
    """Return the domains of `second` of which a block is in `first` too: the same text."""
    known = {block["input_ids"].tobytes() for blocks in first.values() for block in blocks}
    return [name for name, blocks in second.items() if any(block["input_ids"].tobytes() in known for block in blocks)]
