"""Memory of a training run on each GPU, before it runs.

A step has a few moments that can be its highest: the end of the forward pass, the gradient of the loss, the gradients
of the last and of the first layer, and the optimizer's step. `estimate_memory` adds up what is there at each of them
and gives the parts of the highest. What a layer keeps for its backward pass was read off autograd's saved tensors;
`benchmarks/memory.py` holds the sums against measured peaks.

Dimensions: T tokens of a process's micro-batch, S sequence, H hidden size, A width of all query heads, B that of all
key heads, I intermediate size, E experts, K experts of a token, V vocabulary, C tokens of a chunk of the loss.
Bytes of an element: a in the computation, r in the residual stream, w of a weight as it is stored.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from modeling_upcycled_moe import UpcycledQwenMoeConfig  # registers the classes too

from ..common.flops import expert_size, head_size, moe_pattern, num_experts


FLOAT32 = 4
# CUDA's context, workspaces of cuBLAS, buffers of NCCL: an assumption, of which torch's own peak shows nothing.
OVERHEAD_BYTES = 1_000_000_000
# Layers that FSDP2 holds whole at a time: the one that computes, and the next that it fetches meanwhile.
FETCHED_LAYERS = 2
# DeepSpeed's defaults of `reduce_bucket_size` and of `sub_group_size`, the weights that a step of its optimizer takes.
ZERO3_BUCKET_ELEMENTS = 500_000_000
ZERO3_SUB_GROUP_ELEMENTS = 1_000_000_000

ADAM_STATES = 2
# Bytes that optimizers keep for each weight, by their name in `optim`, and what they keep for a block of them:
# bitsandbytes and torchao quantise both moments in blocks of 256 with a float32 scale each.
STATE_BYTES = {
    "adamw_bnb_8bit": ADAM_STATES * (1 + FLOAT32 / 256),
    "adamw_8bit": ADAM_STATES * (1 + FLOAT32 / 256),
    "paged_adamw_8bit": ADAM_STATES * (1 + FLOAT32 / 256),
    "adamw_torch_8bit": ADAM_STATES * (1 + FLOAT32 / 256),
    "adamw_torch_4bit": ADAM_STATES * (0.5 + FLOAT32 / 128),
    "ademamix_8bit": 3 * (1 + FLOAT32 / 256),
    "lion_8bit": 1 + FLOAT32 / 256,
    "paged_lion_8bit": 1 + FLOAT32 / 256,
    "sgd": 0,
}
# Others keep so many numbers of the weight's own type for each weight.
STATES = {"lion_32bit": 1, "paged_lion_32bit": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3}
ADAM_NAMES = ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "paged_adamw_32bit", "adamw_anyprecision")


@dataclass(frozen=True)
class Layout:
    """How a run is spread over processes, and what it holds: the settings that memory depends on.

    Args:
        engine: who spreads the weights: nobody or DDP (`ddp`), FSDP2, DeepSpeed's ZeRO-3, or Transformers as it loads
            the model (`load`), where tensor or expert parallelism is given.
        shard_size: processes that share one copy of the weights, under FSDP2; all by default.
        sync_each_batch: whether gradients are reduced after each micro-batch, not only after the last of a step.
        micro_batch_size: sequences of a process's micro-batch.
        weight_dtype: type that the weights are stored in.
        mixed_precision: type of the computation, if another one.
        loss_chunk_tokens: C; None for all logits at once.
        separates_documents: whether a mask keeps the documents of a sequence apart.
        float32_routers: whether routers compute in float32 whatever the rest does.
    """

    num_processes: int = 1
    engine: Literal["ddp", "fsdp2", "zero3", "load"] = "ddp"
    shard_size: int | None = None
    reshard_after_forward: bool = True
    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    context_parallel_size: int = 1
    micro_batch_size: int = 1
    sequence_length: int = 4096
    gradient_accumulation_steps: int = 1
    sync_each_batch: bool = True
    weight_dtype: torch.dtype = torch.float32
    mixed_precision: torch.dtype | None = None
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    experts_implementation: str = "grouped_mm"
    loss_chunk_tokens: int | None = None
    separates_documents: bool = False
    float32_routers: bool = False

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.micro_batch_size * self.sequence_length // self.context_parallel_size

    @property
    def num_shards(self) -> int:
        """Parts that weights, gradients and optimizer are cut into."""
        if self.engine == "ddp":
            return 1
        return self.shard_size or self.num_processes

    @property
    def compute_bytes(self) -> int:
        """a."""
        return (self.mixed_precision or self.weight_dtype).itemsize

    @property
    def stored_bytes(self) -> int:
        """w."""
        return self.weight_dtype.itemsize

    @property
    def casts_while_computing(self) -> bool:
        """Whether autocast turns each weight into the type of the computation where it is used.

        Sharded weights have that type when they are gathered.
        """
        return self.engine in ("ddp", "load") and self.compute_bytes != self.stored_bytes

    @property
    def residual_bytes(self) -> int:
        """r."""
        return self.stored_bytes if self.casts_while_computing else self.compute_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a GPU at the moment of a step when most are needed.

    Args:
        moment: which one that is.
        weights: as they are stored, this process's part.
        gradients: those that are there by then.
        optimizer: moments, and ZeRO's float32 copy of the weights.
        weight_copies: weights in the type of the computation, under autocast.
        activations: what layers keep for the backward pass, and work with in it.
        loss: logits and their gradient, or a chunk of them.
        communication: gathered layers, and buffers of gradients on their way.
        overhead: assumed for driver and libraries.
        notes: what is assumed where nothing better is known.
    """

    moment: str
    weights: int
    gradients: int = 0
    optimizer: int = 0
    weight_copies: int = 0
    activations: int = 0
    loss: int = 0
    communication: int = 0
    overhead: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each part."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.type is int}

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` would say: all but the overhead."""
        return self.total_bytes - self.overhead

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON."""
        return {**asdict(self), "notes": list(self.notes), "total_bytes": self.total_bytes}


@dataclass(frozen=True)
class Weights:
    """Shapes of a model's weights: embedding and output matrix, then for each layer its dense ones and its experts."""

    ends: tuple[torch.Size, ...]
    dense: tuple[tuple[torch.Size, ...], ...]
    experts: tuple[tuple[torch.Size, ...], ...]

    @property
    def largest_layer(self) -> int:
        """Elements of the largest layer."""
        return max(
            num_elements(dense) + num_elements(experts)
            for dense, experts in zip(self.dense, self.experts, strict=True)
        )

    @property
    def shapes(self) -> list[torch.Size]:
        """All of them."""
        return [*self.ends, *(shape for layer in (*self.dense, *self.experts) for shape in layer)]


def num_elements(shapes: Iterable[torch.Size]) -> int:
    """Return the elements of tensors of these shapes."""
    return sum(map(math.prod, shapes))


def weights_of(config: Any) -> Weights:
    """Return the shapes of the weights of the causal language model that `config` describes; a tied head counts once.

    The model is built without storage.
    """
    # A copy: building a model settles fields of its configuration.
    config = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ends, dense, experts = [], [[] for _ in model.model.layers], [[] for _ in model.model.layers]
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "layers" not in parts:
            ends.append(parameter.shape)
        else:
            kind = experts if "experts" in parts else dense
            kind[int(parts[parts.index("layers") + 1])].append(parameter.shape)
    return Weights(tuple(ends), tuple(map(tuple, dense)), tuple(map(tuple, experts)))


def estimate_memory(config: Any, layout: Layout, weights: Weights | None = None) -> MemoryEstimate:
    """Return the memory of a training step on each GPU.

    Weights, gradients and optimizer follow from the shapes of the weights; `activation_bytes` and `loss_bytes` say
    what a micro-batch adds, `communication_bytes` what an engine does. Balanced routing is assumed where experts are
    shared out over processes.

    Args:
        config: of the model to train: one of this package's, or a dense or MoE one of Transformers'.
        layout: the rest.
        weights: those of `config`, if they are known already.
    """
    return max(estimate_moments(config, layout, weights), key=lambda moment: moment.total_bytes)


def estimate_moments(config: Any, layout: Layout, weights: Weights | None = None) -> list[MemoryEstimate]:
    """Return the memory on each GPU at the moments of a step that can be its highest; see [`estimate_memory`]."""
    weights = weights or weights_of(config)
    shards = layout.num_shards
    total = num_elements(weights.shapes)
    embedding = config.vocab_size * config.hidden_size
    is_zero3 = layout.engine == "zero3"
    gradient_bytes = layout.compute_bytes if is_zero3 else layout.stored_bytes
    gradients = total * gradient_bytes // shards
    optimizer, notes = _optimizer_bytes(weights, layout)
    held = {
        "weights": total * gradient_bytes // shards,
        "optimizer": optimizer,
        "overhead": OVERHEAD_BYTES,
        "notes": notes,
    }
    # ZeRO-3 has one place for all gradients from the start on.
    accumulated = gradients if layout.gradient_accumulation_steps > 1 or is_zero3 else 0
    if accumulated and layout.engine == "fsdp2" and not layout.sync_each_batch:
        # Until the last micro-batch of a step each process holds the whole model's gradients, not its shard.
        accumulated = total * layout.compute_bytes
        held["notes"] += (
            "Between micro-batches every GPU holds the gradients of all weights; sync_each_batch shards them.",
        )
    layer_bytes = [activation_bytes(config, layout, is_moe) for is_moe in moe_pattern(config)]
    kept, rebuilt = sum(layer_bytes), 0
    if layout.gradient_checkpointing:
        kept, rebuilt = (
            len(layer_bytes) * layout.num_tokens * config.hidden_size * layout.residual_bytes,
            max(layer_bytes),
        )
    ends = layout.num_tokens * config.hidden_size * (2 * layout.residual_bytes + FLOAT32 + layout.compute_bytes)
    copies, head_copy = _weight_copies(config, weights, layout)
    kept_copies = 0 if layout.gradient_checkpointing else copies - head_copy
    buffers = communication_bytes(weights, layout)
    loss = loss_bytes(config, layout)
    head_gradient = 0 if accumulated else embedding * gradient_bytes // shards
    chunk_gradient = head_gradient if layout.loss_chunk_tokens else 0
    working = max(working_bytes(config, layout, is_moe) for is_moe in set(moe_pattern(config)))
    # The embedding's gradient is dense, and added to the head's where that is the same matrix.
    tied = embedding * layout.compute_bytes if config.tie_word_embeddings else 0

    return [
        MemoryEstimate(
            "end of the forward pass",
            gradients=accumulated + chunk_gradient,
            weight_copies=copies,
            activations=kept + ends,
            loss=loss["forward"],
            communication=buffers["forward"],
            **held,
        ),
        MemoryEstimate(
            "gradient of the loss",
            gradients=accumulated + chunk_gradient,
            weight_copies=kept_copies + (0 if layout.loss_chunk_tokens else head_copy),
            activations=kept + ends,
            loss=loss["backward"],
            communication=buffers["forward"],
            **held,
        ),
        MemoryEstimate(
            "gradient of the last layer",
            gradients=accumulated + head_gradient,
            weight_copies=kept_copies,
            activations=kept + rebuilt + working,
            communication=buffers["backward"],
            **held,
        ),
        MemoryEstimate(
            "gradient of the first layer",
            gradients=max(gradients, accumulated),
            activations=max(layer_bytes[0] + working, tied),
            communication=buffers["backward"],
            **held,
        ),
        MemoryEstimate(
            "optimizer's step",
            gradients=gradients,
            activations=_optimizer_working_bytes(weights, layout),
            communication=buffers["step"],
            **held,
        ),
    ]


def activation_bytes(config: Any, layout: Layout, is_moe: bool) -> int:
    """Return what autograd saves of one decoder layer.

    For each token, where autocast changes the type, `r ≠ a`, every matrix saves its own copy of its input:

    * two norms: `2 (4 H + r H + 4)`: their input and their normalised input, one of them in float32;
    * attention: `3 a H` (`r H` without autocast) into queries, keys and values; these and the output, `2 a (A + B)`,
      with float32 log-sums. With a mask keys and values are repeated for all heads, `4 a A`, and each layer keeps its
      own copy of the mask, `a S`; eager attention keeps the scores, `(4 + a) S` for each head;
    * Qwen3's norms of queries and keys: `(4 + a)(A + B)`;
    * a dense MLP or shared expert: `2 a H` (`r H`) and `4 a I`: gate, up, activation and product;
    * experts: `K e (2 H + 4 I)`: the gathered input, the same four, and the output that the weights multiply, with
      `e = a`, but see `_experts_bytes`. With `batched_mm` also the weights of each token's experts, `3 K a H I`;
    * routers: the input in float32 or `a`, and a few numbers for each expert.
    """
    hidden, a, r = config.hidden_size, layout.compute_bytes, layout.residual_bytes
    is_cast = a != r
    tensor_size = layout.tensor_parallel_size
    queries = config.num_attention_heads * head_size(config) // tensor_size
    keys = config.num_key_value_heads * head_size(config) // tensor_size
    heads = config.num_attention_heads // tensor_size
    has_mask = layout.separates_documents and layout.attn_implementation in ("sdpa", "eager")

    norms = 2 * (FLOAT32 * hidden + r * hidden + FLOAT32)
    attention = (3 * a if is_cast else r) * hidden + FLOAT32 * heads
    attention += 4 * a * queries if has_mask or layout.attn_implementation == "eager" else 2 * a * (queries + keys)
    if layout.attn_implementation == "eager":
        attention += heads * layout.sequence_length * (FLOAT32 + a * (a != FLOAT32))
    elif has_mask:
        attention += a * layout.sequence_length
    if has_head_norms(config):
        attention += (FLOAT32 + a) * (queries + keys) + FLOAT32 * (heads + config.num_key_value_heads // tensor_size)

    def mlp(width: int) -> int:
        return (2 * a if is_cast else r) * hidden + 4 * a * width // tensor_size

    if not is_moe:
        return layout.num_tokens * (norms + attention + mlp(config.intermediate_size))
    slots, width = config.num_experts_per_tok, expert_size(config)
    experts = slots * _experts_bytes(config, layout) * (2 * hidden + 4 * width) + slots * 44
    if layout.experts_implementation == "batched_mm":
        experts += slots * 3 * a * hidden * width
    # Tokens that several processes share are computed by one of them.
    experts //= tensor_size
    if shared := getattr(config, "shared_expert_intermediate_size", 0):
        experts += mlp(shared) + 2 * a * hidden
    router = (FLOAT32 if layout.float32_routers else a) * hidden + 24 * num_experts(config)
    router += FLOAT32 * (getattr(config, "router_head_dim", None) or 0)
    if getattr(config, "router_type", None) == "mlp":
        router += 2 * a * hidden
    return layout.num_tokens * (norms + attention + router + experts)


def has_head_norms(config: Any) -> bool:
    """Return whether queries and keys are normalised, as in Qwen3."""
    return getattr(config, "base_model_type", config.model_type) in ("qwen3", "qwen3_moe")


def working_bytes(config: Any, layout: Layout, is_moe: bool) -> int:
    """Return what a layer's backward pass holds beside what the forward pass kept, most of which it frees meanwhile.

    The gradient of the FFN's product, `a I` a row, and those of the layer's input and output, `2 r H` a token; the
    gradient of the experts' weights where it has another type than they; with `batched_mm` those of the weights of
    each token's experts, `H I (2 a - a)` a row, and `2 w H I` in the type of the weights.
    """
    a = _experts_bytes(config, layout) if is_moe else layout.compute_bytes
    width = expert_size(config) if is_moe else config.intermediate_size
    rows = layout.num_tokens * (config.num_experts_per_tok if is_moe else 1) // layout.tensor_parallel_size
    states = rows * a * width + 2 * layout.num_tokens * config.hidden_size * layout.residual_bytes
    cast_bytes = layout.stored_bytes if layout.casts_while_computing and a != layout.stored_bytes else 0
    if is_moe and layout.experts_implementation == "batched_mm":
        return states + rows * config.hidden_size * width * (a + 2 * cast_bytes)
    if is_moe and cast_bytes:
        matrices = num_experts(config) * 2 * config.hidden_size * width // layout.expert_parallel_size
        return states + matrices * a
    return states


def loss_bytes(config: Any, layout: Layout) -> dict[str, int]:
    """Return what the loss holds at the end of the forward pass, and when its gradient is formed.

    All logits at once: `a + 4 + 4` bytes for each of the `T V` (logits, their float32 copy, their log-softmax; no copy
    in float32), then `4 + 4 + 4` (log-softmax, its gradient, that of the logits).
    In chunks: `2 a + 4` for each of `C V`, and the gradient of the hidden states, and one of the weight to be added.
    """
    a = layout.compute_bytes
    if not layout.loss_chunk_tokens:
        num_logits = layout.num_tokens * config.vocab_size
        copy = 0 if a == FLOAT32 else a
        return {"forward": num_logits * (copy + 2 * FLOAT32), "backward": num_logits * 3 * FLOAT32}
    num_logits = min(layout.loss_chunk_tokens, layout.num_tokens) * config.vocab_size
    gradient = layout.num_tokens * config.hidden_size * layout.residual_bytes
    chunk = num_logits * (FLOAT32 if a == FLOAT32 else 2 * a + FLOAT32)
    adding = num_logits * a + config.vocab_size * config.hidden_size * a
    return {"forward": gradient + max(chunk, adding), "backward": gradient}


def communication_bytes(weights: Weights, layout: Layout) -> dict[str, int]:
    """Return the buffers of the engine in the forward pass, in the backward pass, and when the optimizer steps.

    * DDP: none, as gradients are views of the buckets that are sent.
    * FSDP2: the embedding and the output matrix whole, `FETCHED_LAYERS` layers whole, in the backward pass also their
      gradients and one layer's on its way. Without resharding after the forward pass all layers.
    * ZeRO-3: four bytes for each weight of the largest layer (DeepSpeed's estimate_zero3_model_states_mem_needs), and
      the bucket that gradients are reduced from, which is there from the start on.
    """
    if layout.num_processes == 1 or layout.engine == "ddp":
        return {"forward": 0, "backward": 0, "step": 0}
    if layout.engine == "zero3":
        live, bucket = FLOAT32 * weights.largest_layer, ZERO3_BUCKET_ELEMENTS * layout.compute_bytes
        return {"forward": live + bucket, "backward": live + bucket, "step": bucket}
    a = layout.stored_bytes if layout.engine == "load" else layout.compute_bytes
    ends = num_elements(weights.ends) * a // layout.tensor_parallel_size
    layer = max(
        num_elements(dense) // layout.tensor_parallel_size + num_elements(experts) // layout.expert_parallel_size
        for dense, experts in zip(weights.dense, weights.experts, strict=True)
    )
    fetched = ends + FETCHED_LAYERS * layer * a
    if not layout.reshard_after_forward:
        fetched = num_elements(weights.shapes) * a
    return {"forward": fetched, "backward": fetched + ends + (FETCHED_LAYERS + 1) * layer * a, "step": 0}


def _experts_bytes(config: Any, layout: Layout) -> int:
    """Bytes of an element that experts compute.

    Autocast passes `grouped_mm` by, which then keeps the weights' type; the upcycled model hands it copies.
    """
    is_left_out = layout.experts_implementation == "grouped_mm" and layout.casts_while_computing
    is_upcycled = config.model_type == UpcycledQwenMoeConfig.model_type
    return layout.stored_bytes if is_left_out and not is_upcycled else layout.compute_bytes


def _weight_copies(config: Any, weights: Weights, layout: Layout) -> tuple[int, int]:
    """Return the bytes that autocast copies of all matrices, and of the output matrix."""
    if not layout.casts_while_computing:
        return 0, 0
    head = config.vocab_size * config.hidden_size * layout.compute_bytes // layout.tensor_parallel_size
    dense = num_elements(shape for layer in weights.dense for shape in layer if len(shape) > 1)
    experts = num_elements(shape for layer in weights.experts for shape in layer)
    if config.model_type != UpcycledQwenMoeConfig.model_type and layout.experts_implementation != "eager":
        # Autocast passes `grouped_mm` by, and `batched_mm` copies the weights of each token's experts, not of all.
        experts = 0
    elif layout.gradient_checkpointing:
        # Copies that the layer makes itself live as long as its activations; autocast keeps its own to the end.
        experts //= max(sum(moe_pattern(config)), 1)
    split = dense // layout.tensor_parallel_size + experts // layout.expert_parallel_size
    return split * layout.compute_bytes + head, head


def _optimizer_bytes(weights: Weights, layout: Layout) -> tuple[int, tuple[str, ...]]:
    """Return what the optimizer keeps, and a note where that is an assumption."""
    total, notes = num_elements(weights.shapes), ()
    if layout.optim == "adafactor":
        # A sum for each row and each column of a matrix (arXiv 1804.04235, section 3); vectors have one for each.
        numbers = sum(
            math.prod(shape[:-2]) * (shape[-2] + shape[-1]) if len(shape) > 1 else math.prod(shape)
            for shape in weights.shapes
        )
        state_bytes = numbers * FLOAT32
    elif layout.optim in STATE_BYTES:
        state_bytes = round(total * STATE_BYTES[layout.optim])
    else:
        if layout.optim not in (*STATES, *ADAM_NAMES):
            notes = (f"optim={layout.optim} is not known here and counted as AdamW.",)
        dtype_bytes = FLOAT32 if layout.engine == "zero3" else layout.stored_bytes
        state_bytes = total * STATES.get(layout.optim, ADAM_STATES) * dtype_bytes
    if layout.engine == "zero3":
        state_bytes += total * FLOAT32
    return state_bytes // layout.num_shards, notes


def _optimizer_working_bytes(weights: Weights, layout: Layout) -> int:
    """Return what the optimizer's step holds beside its state.

    `adamw_torch` works on all weights at a time on a GPU (foreach), and holds one number for each; the fused one holds
    nothing; the others work weight by weight. ZeRO-3 also copies the gradients of one group of weights to float32.
    """
    if layout.engine == "zero3":
        group = min(num_elements(weights.shapes) // layout.num_shards, ZERO3_SUB_GROUP_ELEMENTS)
        return FLOAT32 * group * (2 if layout.optim == "adamw_torch" else 1)
    if layout.optim in ("adamw_torch_fused", "adamw_apex_fused") or "bnb" in layout.optim or "paged" in layout.optim:
        return 0
    if layout.optim == "adamw_torch":
        return num_elements(weights.shapes) * layout.stored_bytes // layout.num_shards
    return 2 * FLOAT32 * max(map(math.prod, weights.shapes)) // layout.num_shards
