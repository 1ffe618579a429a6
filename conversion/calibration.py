"""What the attention heads and the FFN of each layer see on real text, one layer in memory at a time.

The dense model runs layer by layer: a layer's weights are loaded, all calibration text goes through it, and its
outputs are the next layer's inputs. So memory holds the activations and one layer, whatever the size of the model.

Dimensions: N sequences of S tokens, B sequences at a time, H hidden size, n attention heads of size h, m key-value
heads.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from ..common.settings import SettingsError
from ..common.streaming.stored import DTYPES
from ..common.text import open_text, pack_blocks
from .recipe import ConversionRecipe
from .source import DenseSource


DECODER_LAYERS = {"qwen2": Qwen2DecoderLayer, "qwen3": Qwen3DecoderLayer}
ROTARY_EMBEDDINGS = {"qwen2": Qwen2RotaryEmbedding, "qwen3": Qwen3RotaryEmbedding}
# Where the keys before rotation come out: after the normalisation that Qwen3 has.
KEY_MODULES = {"qwen2": "k_proj", "qwen3": "k_norm"}
ATTENTION_NAME = "upcycling_calibration"


@dataclass
class LayerActivations:
    """What one layer saw.

    Args:
        layer: index of the layer.
        mean_keys: average key of each query head [n, h] (heads that share a key-value head have the same).
        attended_keys: average key that each query head attends to [n, h], or None if it was not asked for.
        ffn_inputs: inputs of the FFN [T, H], one tensor a batch.
        domain_means: average input of the FFN in the text of each domain [domains, H], or None if there is but one.
    """

    layer: int
    mean_keys: Tensor
    attended_keys: Tensor | None
    ffn_inputs: list[Tensor]
    domain_means: Tensor | None = None


def _sum(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return the sum in float64, or in float32 where the device has nothing better."""
    return values.sum(dim=dim, dtype=torch.float32 if values.device.type == "mps" else torch.float64)


@dataclass
class _KeyRecorder:
    """Sums over tokens of keys before rotation, and of the keys that each head attends to."""

    attended: bool
    num_tokens: int = 0
    key_sum: Tensor | float = 0.0  # [m, h]
    attended_sum: Tensor | float = 0.0  # [n, h]
    keys: Tensor | None = field(default=None, repr=False)  # [B, m, S, h], of the batch under way

    def record_keys(self, keys: Tensor, head_dim: int) -> None:
        self.keys = keys.reshape(*keys.shape[:2], -1, head_dim).transpose(1, 2)
        self.key_sum = self.key_sum + _sum(self.keys, dim=(0, 2))
        self.num_tokens += self.keys.shape[0] * self.keys.shape[2]


def _recording_attention(module, query, key, value, attention_mask, **kwargs):
    """Scaled-dot-product attention that also lets every head attend to the keys before rotation.

    `mean_t Σ_s A_a[t, s] k_s` of head a needs the attention weights A, which no fast kernel returns; with the keys
    as values the kernel gives the sum itself.
    """
    recorder: _KeyRecorder = module.key_recorder
    if recorder.attended:
        attended, _ = sdpa_attention_forward(module, query, key, recorder.keys, attention_mask, **kwargs)  # [B,S,n,h]
        recorder.attended_sum = recorder.attended_sum + _sum(attended, dim=(0, 1))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _recording_attention)


def compute_dtype(source: DenseSource, device: torch.device) -> torch.dtype:
    """Return the type to calibrate in: the weights' own, but float32 for float16 on a CPU, which is slow there."""
    dtype = DTYPES[source.tensors["model.embed_tokens.weight"].dtype]
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def calibration_blocks(source: DenseSource, recipe: ConversionRecipe) -> Tensor:
    """Return the calibration text as token ids [N, S]; where it has domains, as many sequences of each, in order.

    Raises:
        SettingsError: if tokenizer or text cannot be read, do not fit the model, or have fewer tokens than asked for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
    # Tokenizers raise whatever the reader of their many files raises, bare `Exception` included.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SettingsError(f"{source.name}: its tokenizer cannot be loaded ({reason})") from error
    if recipe.num_domains == 1:
        tokens = _packed_text(recipe.calibration_data, tokenizer, recipe, recipe.num_calibration_blocks)
    else:
        num_blocks = recipe.num_calibration_blocks // recipe.num_domains
        tokens = torch.cat(
            [_packed_text([domain], tokenizer, recipe, num_blocks) for domain in recipe.calibration_data]
        )
    if tokens.max() >= source.config.vocab_size:
        raise SettingsError(
            f"{source.name}: its tokenizer gives token {tokens.max()}, the model's vocab_size is "
            f"{source.config.vocab_size}; put the model's own tokenizer beside it."
        )
    return tokens


def _packed_text(names: list[str], tokenizer, recipe: ConversionRecipe, num_blocks: int) -> Tensor:
    """Return `num_blocks` sequences [., S] of the text that `names` name."""
    documents = open_text(names, recipe.calibration_split, recipe.calibration_text_column)
    packed = pack_blocks(documents, tokenizer, recipe.calibration_block_size)
    blocks = [torch.tensor(block["input_ids"]) for block in islice(packed, num_blocks)]
    if len(blocks) < num_blocks:
        where = "calibration_data" if recipe.num_domains == 1 else f"calibration_data, domain {names[0]!r},"
        share = "" if recipe.num_domains == 1 else f" in equal parts from {recipe.num_domains} domains"
        raise SettingsError(
            f"{where} has {len(blocks) * recipe.calibration_block_size} tokens in whole sequences, "
            f"calibration_tokens={recipe.calibration_tokens}{share} asks for more; lower it or give more text."
        )
    return torch.stack(blocks)


@torch.no_grad()
def calibrate(
    source: DenseSource,
    blocks: Tensor,
    layers: Sequence[int],
    *,
    attended: bool,
    batch_size: int,
    device: torch.device,
    num_domains: int = 1,
    on_layer: Callable[[], None] = lambda: None,
) -> Iterator[LayerActivations]:
    """Run `blocks` [N, S] through the dense model and yield what each of `layers` saw, in order.

    Layers above the last one asked for do not run.

    Args:
        attended: whether to average attended keys too.
        batch_size: sequences at a time.
        num_domains: with more than one, the first N / num_domains sequences are text of the first domain, and so on.
        on_layer: called after each layer, for a progress bar.
    """
    dtype = compute_dtype(source, device)
    config = deepcopy(source.config)
    config._attn_implementation = "sdpa"
    embedding = source.tensors["model.embed_tokens.weight"].load()
    hidden = [F.embedding(batch, embedding).to(device, dtype) for batch in blocks.split(batch_size)]
    shared_arguments = _SharedArguments(config, device)
    for layer_idx in range(max(layers) + 1):
        layer = _load_layer(source, config, layer_idx, device, dtype)
        recorder = layer.self_attn.key_recorder
        recorder.attended = attended and layer_idx in layers
        ffn_inputs: list[Tensor] = []
        if layer_idx in layers:
            layer.post_attention_layernorm.register_forward_hook(partial(_append_output, ffn_inputs))
        for number, batch in enumerate(hidden):
            hidden[number] = layer(batch, **shared_arguments.for_batch(batch, layer_idx))
        if layer_idx in layers:
            mean_keys = (recorder.key_sum / recorder.num_tokens).repeat_interleave(
                config.num_attention_heads // config.num_key_value_heads, dim=0
            )
            yield LayerActivations(
                layer=layer_idx,
                mean_keys=mean_keys.cpu(),
                attended_keys=(recorder.attended_sum / recorder.num_tokens).cpu() if attended else None,
                ffn_inputs=[batch.flatten(0, 1) for batch in ffn_inputs],
                domain_means=_domain_means(ffn_inputs, num_domains) if num_domains > 1 else None,
            )
        on_layer()


def _domain_means(batches: list[Tensor], num_domains: int) -> Tensor:
    """Return the average over tokens [num_domains, H] of batches [B, S, H], whose sequences are ordered by domain."""
    sums = torch.cat([_sum(batch, dim=(1,)) for batch in batches])  # [N, H]
    return (sums.unflatten(0, (num_domains, -1)).mean(dim=1) / batches[0].shape[1]).cpu()


def _append_output(outputs: list[Tensor], module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
    outputs.append(output)


class _SharedArguments:
    """Masks and rotary embeddings, which depend on a batch's shape and the layer's type only."""

    def __init__(self, config, device: torch.device):
        self.config = config
        self.rotary_embedding = ROTARY_EMBEDDINGS[config.model_type](config).to(device)
        self.cache: dict[tuple, dict] = {}

    def for_batch(self, batch: Tensor, layer_idx: int) -> dict:
        layer_type = self.config.layer_types[layer_idx]
        key = (layer_type, batch.shape)
        if key not in self.cache:
            positions = torch.arange(batch.shape[1], device=batch.device).unsqueeze(0)
            create_mask = create_sliding_window_causal_mask if "sliding" in layer_type else create_causal_mask
            self.cache[key] = {
                "attention_mask": create_mask(
                    config=self.config,
                    inputs_embeds=batch,
                    attention_mask=None,
                    past_key_values=None,
                    position_ids=positions,
                ),
                "position_ids": positions,
                "position_embeddings": self.rotary_embedding(batch, positions),
            }
        return self.cache[key]


def _load_layer(source: DenseSource, config, layer_idx: int, device: torch.device, dtype: torch.dtype):
    """Return decoder layer `layer_idx` with its weights, recording its keys."""
    layer_config = deepcopy(config)
    layer_config._attn_implementation = ATTENTION_NAME
    with torch.device("meta"):
        layer = DECODER_LAYERS[config.model_type](layer_config, layer_idx)
    names = dict(layer.named_parameters())
    state = {
        name: tensor.load().to(device, dtype) for name, tensor in source.layer(layer_idx).items() if name in names
    }
    layer.load_state_dict(state, assign=True)
    recorder = _KeyRecorder(attended=False)
    layer.self_attn.key_recorder = recorder
    key_module = getattr(layer.self_attn, KEY_MODULES[config.model_type])
    key_module.register_forward_hook(lambda _, __, keys: recorder.record_keys(keys, source.head_dim))
    return layer.eval()
