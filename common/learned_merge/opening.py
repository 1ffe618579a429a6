"""Checkpoints of one architecture, as they are opened to be merged."""

from torch import Tensor
from transformers import PreTrainedConfig

from modeling_upcycled_moe import UpcycledQwenMoeConfig

from ..checkpoint_source import CheckpointSource
from ..checkpoints import load_config, model_without_weights
from ..moe_source import open_moe
from ..provenance import read_provenance
from ..settings import SettingsError
from ..streaming.fetch import locate
from ..streaming.stored import SourceError, StoredTensor, check_stored, read_config, read_tensors


_DENSE_TYPES = ("qwen2", "qwen3")
# Settings that say nothing of what a model computes from its weights, and that training may change.
_FREE_SETTINGS = frozenset(
    {
        "_name_or_path",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "expert_nodes",
        "initializer_range",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_bias_update_rate",
        "router_dtype",
        "router_entropy_loss_coef",
        "router_jitter_noise",
        "router_locality_loss_coef",
        "router_z_loss_coef",
        "transformers_version",
        "use_cache",
    }
)


def open_checkpoint(model: str) -> CheckpointSource:
    """Read configuration and tensor headers of a dense Qwen model or one of this package's; no weight is read.

    Args:
        model: local folder, or Hub id, which is downloaded first.

    Raises:
        SettingsError: if it is another model, or a file is missing, truncated or damaged.
    """
    folder, commit = locate(model, None)
    raw = read_config(model, folder)
    if raw.get("model_type") == UpcycledQwenMoeConfig.model_type:
        return open_moe(model)
    if raw.get("model_type") not in _DENSE_TYPES:
        raise SourceError(
            f"{model}: model_type {raw.get('model_type')!r} cannot be merged; allowed: "
            f"{', '.join(map(repr, (*_DENSE_TYPES, UpcycledQwenMoeConfig.model_type)))}."
        )
    if raw.get("quantization_config"):
        raise SourceError(f"{model}: its weights are quantized; give the checkpoint that it was quantized from.")
    config = load_config(str(folder), own_code=False)
    config.architectures = config.architectures or [f"{config.model_type.capitalize()}ForCausalLM"]
    tensors = read_tensors(folder)
    _check_tensors(model, config, tensors)
    return CheckpointSource(model, folder, commit, config, tensors, read_provenance(folder))


def _check_tensors(model: str, config: PreTrainedConfig, tensors: dict[str, StoredTensor]) -> None:
    expected = expected_tensors(config)
    for name, tensor in expected.items():
        if name not in tensors:
            raise SourceError(f"{model}: tensor {name!r} is missing; is a shard absent from the index?")
        check_stored(model, tensors[name])
        if tensors[name].shape != tuple(tensor.shape):
            raise SourceError(
                f"{model}: {name!r} has shape {tensors[name].shape}, the configuration says {tuple(tensor.shape)}."
            )
    # A tied head may be stored as well; old checkpoints also stored the rotary frequencies.
    for name in tensors:
        if name not in expected and name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            raise SourceError(f"{model}: tensor {name!r} has no place in a {config.architectures[0]}.")


def expected_tensors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return the parameters and buffers of the model, without contents, and without a head that is the embedding."""
    state = model_without_weights(config.architectures[0], config, own_code=False).state_dict(keep_vars=True)
    return {
        name: tensor for name, tensor in state.items() if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }


def check_alike(first: CheckpointSource, other: CheckpointSource) -> None:
    """Check that `other` computes the same from its weights as `first`; then its tensors have the same shapes.

    Raises:
        SettingsError: at the first setting that differs.
    """
    ours, its = first.config.to_dict(), other.config.to_dict()
    free = _FREE_SETTINGS
    if not first.config.architectures[0].endswith("ForSequenceClassification"):
        free |= {"pad_token_id"}  # a classifier finds by it which token to score
    for name in sorted((ours.keys() | its.keys()) - free):
        if ours.get(name) != its.get(name):
            raise SettingsError(
                f"{other.name}: {name}={its.get(name)!r} in config.json, and {ours.get(name)!r} in {first.name}; only "
                "checkpoints of one architecture can be merged."
            )
