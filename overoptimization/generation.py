"""Samples of a policy: its responses to prompts, drawn from all of its distribution."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..common.checkpoints import check_code, load_config, load_model, load_tokenizer
from ..common.devices import best_device
from ..common.progress import Progress
from ..common.settings import SettingsError
from ..common.text import first_line
from ..common.text_files import find_text
from ..preference.pairs import read_pairs
from ..preference.settings import PairSettings
from .identity import checkpoint_identity
from .samples import MIN_PROMPTS, Messages, SampleTable, as_messages, read_rows
from .settings import PolicySettings


_CONTENT = "content"


def read_prompts(settings: PolicySettings) -> list[Messages]:
    """Return the different prompts of pairs, or of files with a column `prompt`, in their order.

    Raises:
        SettingsError: if they cannot be read, or are too few.
    """
    found: dict[str, Messages] = {}
    for place in find_text(settings.prompts, settings.split):
        for prompt in _prompts_of(place.name, place.file, settings.split):
            found.setdefault(json.dumps(prompt), prompt)
    prompts = list(found.values())[: settings.max_prompts]
    if len(prompts) < MIN_PROMPTS:
        raise SettingsError(
            f"{', '.join(settings.prompts)}: {len(prompts)} different prompts; give {MIN_PROMPTS} at least, better a "
            "hundred."
        )
    return prompts


def sample_facts(
    settings: PolicySettings, prompts: list[Messages], *, batch_size: int, dtype: str = "auto"
) -> dict[str, Any]:
    """Return what makes samples what they are; those with the same facts need not be drawn again."""
    return {
        "policy": checkpoint_identity(settings.policy),
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "num_samples": settings.num_samples,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        # Responses that are drawn together share random numbers.
        "batch_size": min(batch_size, settings.num_samples),
        "dtype": dtype,
    }


def generate_samples(
    settings: PolicySettings,
    prompts: list[Messages],
    *,
    batch_size: int,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> SampleTable:
    """Return the responses of the policy to `prompts`.

    Tokens are drawn from the whole softmax at the temperature that is asked for: what generation_config.json says of
    top-k, top-p or penalties is left out, as the divergence of best-of-n is that from this policy. Each prompt has its
    own draws: prompts that are added change no others. Prompts that leave no place for a response are left out.

    Raises:
        SettingsError: if the policy cannot be loaded or has no chat template, or too few prompts are left.
    """
    progress = progress or Progress()
    name, revision = settings.policy.path, settings.policy.revision
    check_code(name, trust_remote_code=trust_remote_code, revision=revision)
    config = load_config(name, revision=revision)
    tokenizer = load_tokenizer(name, config=config, revision=revision)
    if tokenizer.chat_template is None:
        raise SettingsError(
            f"{name}: its tokenizer has no chat template, which prompts need; give a policy that has one."
        )
    model = load_model(name, config, dtype=dtype, device=best_device(), revision=revision)
    if not model.can_generate():
        raise SettingsError(f"{name}: is no language model ({type(model).__name__}); give a policy that generates.")
    token_ids = _rendered(tokenizer, prompts, config, settings, progress)
    generation = _generation_config(model, tokenizer, settings)
    kept, responses, num_cut = [], [], 0
    with progress.task("Drawing responses", len(token_ids), "prompts") as advance:
        for number, ids in token_ids.items():
            texts, cut = _respond(model, tokenizer, ids, generation, settings, number, batch_size)
            kept.append(prompts[number])
            responses.append(texts)
            num_cut += cut
            advance(1)
    if num_cut:
        progress.warn(
            f"{num_cut:,} of {len(kept) * settings.num_samples:,} responses do not end within "
            f"{settings.max_new_tokens} tokens and are cut; raise --max-new-tokens if that matters."
        )
    facts = sample_facts(settings, prompts, batch_size=batch_size, dtype=dtype)
    origin = {**facts, "num_prompts_left_out": len(prompts) - len(kept), "num_cut": num_cut}
    return SampleTable(kept, responses, origin)


def _prompts_of(name: str, file: Path | None, split: str) -> list[Messages]:
    if file is not None and file.suffix in (".parquet", ".jsonl"):
        rows = read_rows(file)
        if rows and "prompt" in rows[0] and "chosen" not in rows[0]:
            return [as_messages(row.get("prompt"), f"{name}: row {number}") for number, row in enumerate(rows)]
    return list(read_pairs(PairSettings([name], split))["prompt"])


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    config: Any,
    settings: PolicySettings,
    progress: Progress,
) -> dict[int, torch.Tensor]:
    """Return the tokens [1, length] of those prompts, by their number, that leave a place for the response."""
    longest = config.max_position_embeddings - settings.max_new_tokens
    try:
        rendered = {
            number: tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
            for number, prompt in enumerate(prompts)
        }
    except TemplateError as error:
        raise SettingsError(
            f"{settings.policy.path}: its chat template refuses a prompt ({first_line(error)}); give others."
        ) from error
    kept = {number: ids for number, ids in rendered.items() if ids.shape[1] <= longest}
    if len(kept) < MIN_PROMPTS:
        raise SettingsError(
            f"{settings.policy.path}: {len(kept)} of {len(prompts)} prompts leave {settings.max_new_tokens} of the "
            f"model's {config.max_position_embeddings} positions for a response; lower max_new_tokens."
        )
    if len(kept) < len(prompts):
        progress.warn(
            f"{len(prompts) - len(kept)} of {len(prompts)} prompts are longer than {longest} tokens and are left out."
        )
    return kept


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: PolicySettings
) -> GenerationConfig:
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    ends = {*ends, tokenizer.eos_token_id, _end_of_turn(tokenizer)} - {None}
    # Transformers fills what a configuration leaves open from the checkpoint's own.
    model.generation_config = GenerationConfig()
    return GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template puts behind an answer; None if there is none."""
    turns = [{"role": "user", "content": _CONTENT}, {"role": "assistant", "content": _CONTENT}]
    end = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_CONTENT)[2]
    tokens = tokenizer(end, add_special_tokens=False).input_ids
    return next((token for token in tokens if token in tokenizer.all_special_ids), None)


def _respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    generation: GenerationConfig,
    settings: PolicySettings,
    number: int,
    batch_size: int,
) -> tuple[list[str], int]:
    """Return the responses to the prompt with this number, and how many of them do not end."""
    texts, num_cut = [], 0
    # `generate` takes no generator of its own.
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(_seed_of(settings.seed, number))
        while len(texts) < settings.num_samples:
            generated = model.generate(
                prompt.to(model.device),
                attention_mask=torch.ones_like(prompt, device=model.device),
                generation_config=generation,
                num_return_sequences=min(batch_size, settings.num_samples - len(texts)),
            )[:, prompt.shape[1] :]
            has_end = torch.isin(generated, torch.tensor(generation.eos_token_id or [], device=generated.device))
            num_cut += int((~has_end.any(dim=1)).sum())
            texts += [text.strip() for text in tokenizer.batch_decode(generated, skip_special_tokens=True)]
    return texts, num_cut


def _seed_of(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7])
