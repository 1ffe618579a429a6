"""What lies in the folder of a checkpoint, as far as its card speaks of it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.companions import has_tokenizer
from ..common.provenance import PROVENANCE_FILE, read_provenance
from ..common.settings import SettingsError
from ..common.streaming.stored import SourceError, read_config, read_tensors
from .provenance_form import check_provenance
from .training import SETTINGS_FILE, STATE_FILE, training_facts


UPCYCLED = "upcycled_qwen_moe"
# Saved beside the weights, but counted by none.
_BUFFERS = ("e_score_correction_bias", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Weights:
    """The size of a checkpoint; tied embeddings count once, and a token meets all but its idle experts."""

    dtypes: tuple[str, ...]
    num_bytes: int
    total_parameters: int
    active_parameters: int


@dataclass(frozen=True)
class Parent:
    """A checkpoint that another one was made of.

    Args:
        name: id on the Hub, or name of a folder.
        terms: licence, language and base model that its own card declares.
    """

    name: str
    is_hub_id: bool
    terms: Mapping[str, Any] = field(default_factory=dict)

    @property
    def link(self) -> str:
        """The name in Markdown."""
        return f"[{self.name}](https://huggingface.co/{self.name})" if self.is_hub_id else f"`{self.name}`"


@dataclass(frozen=True)
class Checkpoint:
    """What a card is filled from.

    Args:
        name: of its folder.
        config: what `config.json` says.
        provenance: what `upcycling.json` says, with the training in this folder; empty without any.
        weights: None where they cannot be read, as those of a run that is sharded.
    """

    name: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    weights: Weights | None
    has_tokenizer: bool

    @property
    def is_upcycled(self) -> bool:
        """Whether it is of this package's model, and brings the code for it."""
        return self.config.get("model_type") == UPCYCLED

    @property
    def num_experts(self) -> int | None:
        """Experts of a MoE layer; None for a dense model."""
        return self.config.get("num_experts") or self.config.get("num_local_experts")

    @property
    def architecture(self) -> str:
        """The class that loads it."""
        return (self.config.get("architectures") or ["ForCausalLM"])[0]

    @property
    def is_causal_lm(self) -> bool:
        """Whether it continues text; else it classifies."""
        return self.architecture.endswith("ForCausalLM")

    @property
    def is_reward_model(self) -> bool:
        """Whether it gives a conversation one score."""
        num_labels = self.config.get("num_labels") or len(self.config.get("id2label") or (0, 1))
        return not self.is_causal_lm and num_labels == 1

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        """What was done after the conversion, in order."""
        return _steps(self.provenance)

    @property
    def is_trained(self) -> bool:
        """Whether it was trained after the conversion, or any of what it was made of."""
        return any(step["command"] == "train" for step in self.steps)

    @property
    def is_as_converted(self) -> bool:
        """Whether it still has the shape that the conversion gave it."""
        return bool(self.description) and all(step["command"] == "train" for step in self.steps)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Settings of the conversion; empty without one."""
        return self.provenance.get("recipe", {})

    @property
    def description(self) -> Mapping[str, Any]:
        """What the conversion says of its result; empty without one."""
        return self.provenance.get("description", {})

    @property
    def is_from_scratch(self) -> bool:
        """Whether the conversion took nothing from its parent but the shape."""
        return bool(self.recipe) and self.recipe["experts"] == self.recipe["backbone"] == "random"

    @cached_property
    def parents(self) -> list[Parent]:
        """The dense models that the conversion began with."""
        if "source" not in self.provenance:
            return []
        sources = [self.provenance["source"], *self.provenance.get("expert_sources", [])]
        terms = self.description.get("terms", [{}] * len(sources))
        return [parent_of(source, declared) for source, declared in zip(sources, terms, strict=True)]


def parent_of(source: Mapping[str, Any], terms: Mapping[str, Any] | None = None) -> Parent:
    """Return the parent that provenance calls `source`, with `terms`; one from the Hub has a commit."""
    is_hub_id = source.get("revision") is not None
    # Not resolved: where a relative name led once, another folder may be now.
    name = source["name"] if is_hub_id else Path(source["name"]).name or source["name"]
    return Parent(name, is_hub_id, terms or {})


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return what lies in `folder`; no weight is read.

    Raises:
        SettingsError: if it is no checkpoint, or its provenance is not as this package writes it.
    """
    config = read_config(str(folder), folder)
    provenance = read_provenance(folder) or {}
    check_provenance(provenance, folder / PROVENANCE_FILE)
    steps = _steps(provenance)
    if not any(step["command"] == "train" for step in steps) and (facts := _training_in(folder)) is not None:
        provenance = {**provenance, "steps": [*steps, {"command": "train", **facts}]}
    return Checkpoint(
        name=folder.resolve().name,
        config=config,
        provenance=provenance,
        weights=_read_weights(folder, config),
        has_tokenizer=has_tokenizer(folder),
    )


def _steps(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = provenance.get("steps", [])
    return [step for step in steps if isinstance(step, dict) and "command" in step] if isinstance(steps, list) else []


def _training_in(folder: Path) -> dict[str, Any] | None:
    """Return the facts of a training whose files lie in `folder`, for runs that wrote no provenance."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        # Its weights may be those of its best step, or of its last one.
        if state.get("best_global_step") not in (None, state["global_step"]):
            return None
        settings_file = folder / SETTINGS_FILE
        return training_facts(state, settings_file if settings_file.is_file() else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SettingsError):
        return None


def _read_weights(folder: Path, config: Mapping[str, Any]) -> Weights | None:
    try:
        tensors = read_tensors(folder).values()
    except SourceError:
        return None
    shapes = {
        tensor.name: tensor.shape
        for tensor in tensors
        if not tensor.name.endswith(_BUFFERS)
        and not (tensor.name == "lm_head.weight" and config.get("tie_word_embeddings"))
    }
    total = sum(map(math.prod, shapes.values()))
    return Weights(
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors})),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        total_parameters=total,
        active_parameters=total - num_idle_parameters(shapes, config),
    )


def num_idle_parameters(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> int:
    """Return how many of the parameters with these `shapes` a token does not meet, at least."""
    num_experts = config.get("num_experts") or config.get("num_local_experts")
    if not num_experts:
        return 0
    idle_share = 1 - min(config["num_experts_per_tok"], num_experts) / num_experts
    experts = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name)
    constants = sum(math.prod(shape) for name, shape in shapes.items() if ".constant_experts." in name)
    return round(experts * idle_share + constants)
