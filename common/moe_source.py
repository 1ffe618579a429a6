"""The upcycled checkpoint that is read: its configuration, and where each of its tensors lies."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_upcycled_moe import (
    ROUTERS,
    Router,
    UpcycledQwenMoeConfig,
    UpcycledQwenMoeForCausalLM,
    UpcycledQwenMoeForSequenceClassification,
)

from .checkpoint_source import CheckpointSource
from .provenance import read_provenance
from .streaming.fetch import locate
from .streaming.stored import SourceError, StoredTensor, check_stored, read_config, read_tensors


MODEL_CLASSES = {
    model_class.__name__: model_class
    for model_class in (UpcycledQwenMoeForCausalLM, UpcycledQwenMoeForSequenceClassification)
}


@dataclass(frozen=True)
class MoeSource(CheckpointSource):
    """An upcycled checkpoint on disk; `config` is of this package's class, and no code beside the weights is run."""

    config: UpcycledQwenMoeConfig

    def router(self, layer_idx: int) -> Router:
        """Return the router of MoE layer `layer_idx`, with weights that are read from the file when they are used."""
        prefix = f"model.layers.{layer_idx}.mlp.gate."
        with torch.device("meta"):
            router = ROUTERS[self.config.router_type](self.config)
        state = {name: self.tensors[prefix + name].load() for name in router.state_dict()}
        router.load_state_dict(state, assign=True)
        return router.eval()


def open_moe(model: str, revision: str | None = None) -> MoeSource:
    """Read configuration and tensor headers of an upcycled checkpoint; no weight is read.

    Args:
        model: local folder, or Hub id, which is downloaded first.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        SettingsError: if it is not an upcycled checkpoint in safetensors, or a file is missing, truncated or damaged.
    """
    folder, commit = locate(model, revision)
    config = _read_config(model, folder)
    tensors = read_tensors(folder)
    _check_tensors(model, config, tensors)
    provenance = read_provenance(folder)
    return MoeSource(model, folder, commit, config, tensors, provenance)


def _read_config(model: str, folder: Path) -> UpcycledQwenMoeConfig:
    raw = read_config(model, folder)
    if raw.get("model_type") != UpcycledQwenMoeConfig.model_type:
        raise SourceError(
            f"{model}: model_type {raw.get('model_type')!r} is not that of an upcycled checkpoint "
            f"({UpcycledQwenMoeConfig.model_type!r}); give one that `upcycled-moe convert` or train/train.py wrote."
        )
    if raw.get("quantization_config"):
        raise SourceError(f"{model}: its weights are quantized; give the checkpoint that it was quantized from.")
    try:
        config = UpcycledQwenMoeConfig.from_dict(raw)
    # AttributeError: of a dtype that PyTorch does not have.
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(
            f"{folder / 'config.json'}: not a valid configuration ({error.__cause__ or error})."
        ) from error
    architecture = (config.architectures or ["UpcycledQwenMoeForCausalLM"])[0]
    if architecture not in MODEL_CLASSES:
        raise SourceError(f"{model}: architecture {architecture!r} is unknown; allowed: {', '.join(MODEL_CLASSES)}.")
    config.architectures = [architecture]
    return config


def _check_tensors(model: str, config: UpcycledQwenMoeConfig, tensors: dict[str, StoredTensor]) -> None:
    with torch.device("meta"):
        expected = MODEL_CLASSES[config.architectures[0]](config).state_dict()
    for name, tensor in tensors.items():
        # A tied head may be stored as well.
        if name not in expected and not (name == "lm_head.weight" and config.tie_word_embeddings):
            raise SourceError(f"{model}: tensor {name!r} has no place in the model that config.json describes.")
        check_stored(model, tensor)
    for name, parameter in expected.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name not in tensors:
            raise SourceError(f"{model}: tensor {name!r} is missing; is a shard absent from the index?")
        if tensors[name].shape != tuple(parameter.shape):
            raise SourceError(
                f"{model}: {name!r} has shape {tensors[name].shape}, the configuration says {tuple(parameter.shape)}."
            )
