"""The dense checkpoint that is read: its configuration, its files, and where each tensor's bytes lie."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..common.settings import SettingsError


# Sizes of the element types that a safetensors header may name and a Qwen checkpoint may have.
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# What an upcycled checkpoint becomes, by what its parent was.
ARCHITECTURES = {
    "Qwen2ForCausalLM": "UpcycledQwenMoeForCausalLM",
    "Qwen2ForSequenceClassification": "UpcycledQwenMoeForSequenceClassification",
    "Qwen3ForCausalLM": "UpcycledQwenMoeForCausalLM",
    "Qwen3ForSequenceClassification": "UpcycledQwenMoeForSequenceClassification",
}

# Matrices of a layer whose bytes become experts and routers.
JOINED_MATRICES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")

# Carried over untouched, if they are there.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
COMPANION_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
COMPANION_FOLDERS = ("additional_chat_templates",)


class SourceError(SettingsError):
    """The dense checkpoint cannot be used as it is."""


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the source: `num_bytes` bytes at `offset` of the file `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int

    def load(self) -> torch.Tensor:
        """Return the tensor, backed by the file: only what is touched is read."""
        storage = torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=self.path.stat().st_size)
        flat = torch.empty(0, dtype=torch.uint8).set_(storage, self.offset, (self.num_bytes,))
        dtype = DTYPES[self.dtype]
        if self.offset % dtype.itemsize:
            # The format does not promise alignment, and old writers did not keep it.
            flat = flat.clone()
        return flat.view(dtype).view(self.shape)


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
    tensors: dict[str, SourceTensor] = field(repr=False)
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
        return any((self.folder / name).exists() for name in TOKENIZER_FILES)

    def layer(self, layer_idx: int) -> dict[str, SourceTensor]:
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
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"revision={revision!r} has no meaning for the local folder {model}; leave it out.")
        commit = None
    elif folder.is_file():
        raise SourceError(f"{model}: is a file; give the folder of the checkpoint.")
    else:
        folder = _download(model, revision, weights)
        commit = folder.name  # a snapshot's folder is named after its commit
    config = _read_config(model, folder)
    repository = None if weights or commit is None else _Repository(model, commit)
    tensors = _read_headers(folder, repository)
    _check_tensors(model, config, tensors)
    return DenseSource(
        name=model, folder=folder, revision=commit, config=config, tensors=tensors, headers_only=not weights
    )


@dataclass(frozen=True)
class _Repository:
    """A Hub repository at a commit, of which no weights are downloaded."""

    model: str
    commit: str

    def has(self, file_name: str) -> bool:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            return self._asking(HfApi().file_exists, file_name)
        except SourceError as error:
            if isinstance(error.__cause__, OfflineModeIsEnabled):
                return False  # then what is in the cache is all there is
            raise

    def read_header(self, path: Path) -> dict[str, SourceTensor]:
        from huggingface_hub import HfApi

        header = self._asking(HfApi().parse_safetensors_file_metadata, path.name).tensors
        return {
            name: SourceTensor(name, entry.dtype, tuple(entry.shape), path, begin, end - begin)
            for name, entry in header.items()
            for begin, end in [entry.data_offsets]
        }

    def _asking(self, function: Callable, file_name: str) -> Any:
        try:
            return function(self.model, file_name, revision=self.commit)
        # Beside the Hub's errors the HTTP client's, which is not the same in all versions of the Hub's library.
        except Exception as error:
            raise SourceError(f"{self.model}: {file_name} cannot be read from the Hub ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _download(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors.index.json", "config.json", "README.md", *COMPANION_FILES]
    patterns += ["*.safetensors"] * weights
    patterns += [f"{name}/*" for name in COMPANION_FOLDERS]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"{model}: neither a local folder nor a Hub model that can be fetched ({_reason(error)})"
        ) from error


def _read_config(model: str, folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    config_path = folder / "config.json"
    try:
        raw = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{model}: there is no config.json; give the folder of a Transformers checkpoint.") from None
    except ValueError as error:
        raise SourceError(f"{config_path}: not valid JSON ({error}); fetch it again.") from None
    if not isinstance(raw, dict):
        raise SourceError(f"{config_path}: holds a {type(raw).__name__} instead of settings; fetch it again.")
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
        raise SourceError(f"{config_path}: not a valid configuration ({error.__cause__ or error}).") from error
    architecture = (config.architectures or [f"{config.model_type.capitalize()}ForCausalLM"])[0]
    if architecture not in ARCHITECTURES:
        raise SourceError(
            f"{model}: architecture {architecture!r} cannot be upcycled; allowed: {', '.join(ARCHITECTURES)}."
        )
    config.architectures = [architecture]
    return config


def _read_headers(folder: Path, repository: _Repository | None) -> dict[str, SourceTensor]:
    index_path = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or (repository and repository.has("model.safetensors")):
        # Transformers too takes it first where there are shards as well.
        weight_map, file_names = {}, ["model.safetensors"]
    elif index_path.exists():
        try:
            weight_map = dict(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"])
            file_names = sorted(set(map(str, weight_map.values())))
        except (ValueError, KeyError, TypeError):
            raise SourceError(f"{index_path}: not a valid index; fetch it again.") from None
    else:
        hint = " It has pytorch_model.bin weights: load and save the model with Transformers first." * bool(
            list(folder.glob("pytorch_model*.bin"))
        )
        raise SourceError(f"{folder}: there is neither model.safetensors nor an index of its shards.{hint}")
    tensors: dict[str, SourceTensor] = {}
    for file_name in file_names:
        is_remote = repository is not None and not (folder / file_name).exists()
        header = repository.read_header(folder / file_name) if is_remote else _read_header(folder / file_name)
        if twice := header.keys() & tensors.keys():
            name = min(twice)
            raise SourceError(
                f"{folder}: tensor {name!r} is both in {tensors[name].path.name} and in {file_name}; fetch them again."
            )
        tensors |= header
    if absent := (weight_map.keys() - tensors.keys()):
        raise SourceError(f"{folder}: the index names {sorted(absent)[0]!r}, but no shard has it; fetch them again.")
    return tensors


def _read_header(path: Path) -> dict[str, SourceTensor]:
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            (header_bytes,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (size_bytes,)
            header = json.loads(file.read(header_bytes)) if 8 + header_bytes <= size_bytes else None
    except FileNotFoundError:
        raise SourceError(f"{path}: the shard is missing; fetch it again.") from None
    except ValueError:
        raise SourceError(f"{path}: not a safetensors file (its header is not JSON); fetch it again.") from None
    if header is None:
        raise SourceError(f"{path}: truncated inside its header ({size_bytes} bytes); fetch it again.")
    start = 8 + header_bytes
    try:
        header.pop("__metadata__", None)
        tensors = {
            name: SourceTensor(name, entry["dtype"], tuple(entry["shape"]), path, start + begin, end - begin)
            for name, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SourceError(f"{path}: not a safetensors file (its header lists no tensors); fetch it again.") from None
    expected = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=start)
    if size_bytes < expected:
        raise SourceError(
            f"{path}: truncated: its header promises {expected} bytes, it has {size_bytes}; fetch it again."
        )
    return tensors


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


def _check_tensors(model: str, config: Any, tensors: dict[str, SourceTensor]) -> None:
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
        if tensor.dtype not in DTYPES:
            raise SourceError(f"{model}: {name!r} has type {tensor.dtype}; allowed: {', '.join(DTYPES)}.")
        if math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize != tensor.num_bytes:
            raise SourceError(f"{tensor.path}: the header's bytes for {name!r} do not fit its shape; fetch it again.")
    for layer_idx in range(config.num_hidden_layers):
        # They meet in one tensor, or one module, of the result.
        names = [f"model.layers.{layer_idx}.{name}.weight" for name in JOINED_MATRICES]
        if len(dtypes := {tensors[name].dtype for name in names}) > 1:
            raise SourceError(
                f"{model}: layer {layer_idx} has matrices of different types ({', '.join(sorted(dtypes))}); "
                "save the model in one type first."
            )
