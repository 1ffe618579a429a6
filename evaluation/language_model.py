"""A loaded model as lm-evaluation-harness asks it.

Dimensions: B prompts in a batch, V vocabulary.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ..common.progress import Progress
from ..common.settings import SettingsError


class _Advance(CacheHook):
    """Counts answers: the harness hands each of them to a cache as soon as it has it."""

    def __init__(self, advance: Callable[[int], None]):
        super().__init__(None)
        self.advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.advance(1)


class _FindNan(LogitsProcessor):
    """Sees whether a model writes by logits that are no numbers: the tokens that come of them look like any others."""

    def __init__(self) -> None:
        self.found: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # scores [B, V]; what is found stays on the device until the end.
        is_nan = scores.isnan().any()
        self.found = is_nan if self.found is None else self.found | is_nan
        return scores


class LanguageModel(HFLM):
    """A loaded model as the harness asks it; counts by task the items whose prompt does not fit in.

    Args:
        model: of any type; log-probabilities are taken in float32 whatever it computes in.
        batch_size: prompts in a forward pass, or `auto`.
        name: what progress calls it.

    Attributes:
        truncated: task and number of each item of which the beginning was cut off.
        num_new_tokens: by task that answers are written for, how many tokens one may have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str,
        name: str = "the model",
        progress: Progress | None = None,
    ):
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
        )
        self.name = name
        self.progress = progress or Progress()
        self.truncated: set[tuple[str, int]] = set()
        self.num_new_tokens: dict[str, int] = {}
        self._asked: Sequence[Instance] = ()
        self._nan = _FindNan()

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where the task does not say; half the model's positions, if these are few."""
        return min(super().max_gen_toks, self.max_length // 2)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each continuation its log-probability, and whether it is the most probable one.

        Raises:
            SettingsError: if one is longer than the model's positions, or its log-probability is not finite.
        """
        self._asked = requests
        try:
            with self._shown(f"Answers scored by {self.name}", requests):
                found = super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._asked = ()
        self._check_finite(requests, [log_probability for log_probability, _ in found])
        return found

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        # Rolling windows come here too, and are asked for by nobody.
        for instance, (_, context, continuation) in zip(self._asked, requests, strict=False):
            if len(continuation) > self.max_length:
                raise SettingsError(
                    f"{instance.task_name}: an answer of {len(continuation)} tokens is longer than the model's "
                    f"{self.max_length} positions; leave the task out (--tasks)."
                )
            # The last token is predicted, and not read.
            if len(context) + len(continuation) > self.max_length + 1:
                self.truncated.add((instance.task_name, instance.doc_id))
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text."""
        with self._shown(f"Texts scored by {self.name}", requests):
            found = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._check_finite(requests, found)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each prompt, up to a stop sign.

        Raises:
            SettingsError: if there is no room for an answer, or the model's logits are no numbers.
        """
        for instance in requests:
            prompt, settings = instance.args
            num_new = settings.get("max_gen_toks", self.max_gen_toks)
            if num_new >= self.max_length:
                raise SettingsError(
                    f"{instance.task_name}: generates up to {num_new} tokens, and the model has {self.max_length} "
                    "positions; leave the task out (--tasks)."
                )
            if len(self.tok_encode(prompt)) > self.max_length - num_new:
                self.truncated.add((instance.task_name, instance.doc_id))
            self.num_new_tokens[instance.task_name] = num_new
        self._nan = _FindNan()
        with self._shown(f"Answers written by {self.name}", requests):
            found = super().generate_until(requests, disable_tqdm=True)
        if self._nan.found is not None and self._nan.found.item():
            self._refuse(", ".join(dict.fromkeys(instance.task_name for instance in requests)))
        return found

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> Any:
        processors = LogitsProcessorList([self._nan])
        return super()._model_generate(context, max_length, stop, logits_processor=processors, **settings)

    def _check_finite(self, requests: Sequence[Instance], log_probabilities: Sequence[float]) -> None:
        for instance, log_probability in zip(requests, log_probabilities, strict=True):
            if not math.isfinite(log_probability):
                self._refuse(instance.task_name)

    def _refuse(self, task: str) -> None:
        raise SettingsError(
            f"{self.name}: its log-probabilities on {task} are not finite; its weights are broken, or too large for "
            "its dtype (try --dtype float32)."
        )

    @contextlib.contextmanager
    def _shown(self, description: str, requests: Sequence[Instance]) -> Iterator[None]:
        """Show progress in place of the harness's own bars."""
        with self.progress.task(description, len(requests), "requests") as advance:
            self.set_cache_hook(_Advance(advance))
            yield

    def num_truncated(self) -> dict[str, int]:
        """Return how many items were cut, by task."""
        return dict(Counter(task for task, _ in self.truncated))
