"""The dense checkpoint that is read: its configuration, its files, and where each tensor's bytes lie."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.companions import has_tokenizer
from ..common.streaming.fetch import Repository, locate
from ..common.streaming.stored import SourceError, StoredTensor, check_stored, read_config, read_tensors


# What an upcycled checkpoint becomes, by what its parent was.
ARCHITECTURES = {
    "Qwen2ForCausalLM": "UpcycledQwenMoeForCausalLM",
    "Qwen2ForSequenceClassification": "UpcycledQwenMoeForSequenceClassification",
    "Qwen3ForCausalLM": "UpcycledQwenMoeForCausalLM",
    "Qwen3ForSequenceClassification": "UpcycledQwenMoeForSequenceClassification",
}

# Matrices of a layer whose bytes become experts and routers.
JOINED_MATRICES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")


@dataclass(frozen=True)
class DenseSource:
    """A dense Qwen checkpoint on disk.

    Args:
        name: what the user called it: a folder or a Hub id.
        folder: where its files lie.
        revision: commit of the Hub repository, if it came from there.
        config: the dense model's configuration.
        tensors: every tensor by name, in the order of the files.
        headers_only: opened for a plan, so that the files of the weights need not be there.
    """

    name: str
    folder: Path
    revision: str | None
    config: Any
    tensors: dict[str, StoredTensor] = field(repr=False)
    headers_only: bool = False

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in order."""
        return sorted({tensor.path for tensor in self.tensors.values()})

    @cached_property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the weights."""
        return has_tokenizer(self.folder)

    def layer(self, layer_idx: int) -> dict[str, StoredTensor]:
        """Return the tensors of decoder layer `layer_idx`, named from inside the layer."""
        prefix = f"model.layers.{layer_idx}."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def open_source(model: str, revision: str | None = None, *, weights: bool = True) -> DenseSource:
    """Read configuration and tensor headers of a dense Qwen checkpoint; no weight is read.

    Args:
        model: local folder, or Hub id, which is downloaded first.
        revision: branch, tag or commit of the Hub repository.
        weights: whether the weights of a Hub model are downloaded. Without them their headers are read from the Hub:
            enough for a plan, but the tensors' files are not there, and their offsets count from the header's end.
    Raises:
        SourceError: if it is not a dense Qwen checkpoint in safetensors, or a file is missing or truncated.
    """
    folder, commit = locate(model, revision, weights=weights)
    config = _read_config(model, folder)
    repository = None if weights or commit is None else Repository(model, commit)
    tensors = read_tensors(folder, repository)
    _check_tensors(model, config, tensors)
    return DenseSource(
        name=model, folder=folder, revision=commit, config=config, tensors=tensors, headers_only=not weights
    )


def _read_config(model: str, folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    raw = read_config(model, folder)
    if raw.get("model_type") not in ("qwen2", "qwen3"):
        raise SourceError(
            f"{model}: model_type {raw.get('model_type')!r} cannot be upcycled; allowed: 'qwen2' (Qwen1.5, 2 and 2.5) "
            "and 'qwen3' (dense)."
        )
    if raw.get("quantization_config"):
        raise SourceError(f"{model}: its weights are quantized; give the checkpoint that it was quantized from.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"{folder / 'config.json'}: not a valid configuration ({error.__cause__ or error})."
        ) from error
    architecture = (config.architectures or [f"{config.model_type.capitalize()}ForCausalLM"])[0]
    if architecture not in ARCHITECTURES:
        raise SourceError(
            f"{model}: architecture {architecture!r} cannot be upcycled; allowed: {', '.join(ARCHITECTURES)}."
        )
    config.architectures = [architecture]
    return config


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a dense Qwen model with this configuration has."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    qkv_bias = config.model_type == "qwen2" or config.attention_bias
    layer = {
        "self_attn.q_proj.weight": (heads * head_dim, hidden),
        "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head_dim),
        "mlp.gate_proj.weight": (config.intermediate_size, hidden),
        "mlp.up_proj.weight": (config.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, config.intermediate_size),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if qkv_bias:
        layer |= {f"self_attn.{name}_proj.bias": layer[f"self_attn.{name}_proj.weight"][:1] for name in "qkv"}
    if config.model_type == "qwen3":
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
        if config.attention_bias:
            layer["self_attn.o_proj.bias"] = (hidden,)
    for layer_idx in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer_idx}.{name}": shape for name, shape in layer.items()}
    if config.architectures[0].endswith("ForSequenceClassification"):
        shapes["score.weight"] = (config.num_labels, hidden)
    elif not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _check_tensors(model: str, config: Any, tensors: dict[str, StoredTensor]) -> None:
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise SourceError(f"{model}: tensor {name!r} is missing; is a shard absent from the index?")
        if tensors[name].shape != shape:
            raise SourceError(f"{model}: {name!r} has shape {tensors[name].shape}, the configuration says {shape}.")
    for name, tensor in tensors.items():
        # A tied head may be stored as well; old checkpoints also stored the rotary frequencies.
        if name not in expected and name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            raise SourceError(f"{model}: tensor {name!r} has no place in a {config.model_type} model.")
        check_stored(model, tensor)
    for layer_idx in range(config.num_hidden_layers):
        # They meet in one tensor, or one module, of the result.
        names = [f"model.layers.{layer_idx}.{name}.weight" for name in JOINED_MATRICES]
        if len(dtypes := {tensors[name].dtype for name in names}) > 1:
            raise SourceError(
                f"{model}: layer {layer_idx} has matrices of different types ({', '.join(sorted(dtypes))}); "
                "save the model in one type first."
            )
