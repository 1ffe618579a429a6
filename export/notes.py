"""What someone should know of an export that is exact."""

from ..common.moe_source import MoeSource
from .obstacles import nonzero_attention_biases
from .targets import Target


# Fields that act in training only, and which no stock architecture has; Mixtral's jitter is another one.
TRAINING_FIELDS = (
    "router_z_loss_coef",
    "router_entropy_loss_coef",
    "router_locality_loss_coef",
    "router_jitter_noise",
)

_VLLM_WAY_OUT = "serve it there with --model-impl transformers."


def export_notes(source: MoeSource, target: Target) -> tuple[str, ...]:
    """Return what changes hands in the export of `source` to `target`, a sentence each."""
    config = source.config
    notes = []
    if config.router_type != "linear":
        notes.append(
            f"router_type={config.router_type!r} is folded into one linear router a layer, computed in float64 and "
            "stored in float32: the same logits up to rounding."
        )
    if config.router_dtype == "float32":
        notes.append(
            "router_dtype='float32' has no field: where the model runs in bfloat16 its routers do too, and near-ties "
            "may go to another expert; in float32 all is the same."
        )
    if config.router_selection == "expert_choice":
        notes.append(
            "router_selection='expert_choice' selects in training only; in evaluation it is top_k, as everywhere here."
        )
    if config.use_router_bias:
        notes.append("the biases of use_router_bias are all zero and left out.")
    if target.has_shared_expert:
        notes += _shared_expert_notes(source)
    if config.attention_bias and not target.attention_biases:
        notes.append("the attention biases are all zero and left out.")
    if training := [f"{name}={getattr(config, name)}" for name in TRAINING_FIELDS if getattr(config, name) != 0]:
        notes.append(f"left out is what acts in training only: {', '.join(training)}.")
    return (*notes, *_reader_notes(source, target))


def _shared_expert_notes(source: MoeSource) -> list[str]:
    config = source.config
    if config.shared_expert_intermediate_size == 0:
        return [
            "there is no shared expert: it is 0 wide, and its gate zero. Transformers lists its tensors as missing at "
            "loading; they have no elements."
        ]
    if config.shared_expert_gating == "plain":
        return [
            "shared_expert_gating='plain' becomes a gate of zeros, which is open by half, and a doubled down_proj: a "
            "factor of two is exact."
        ]
    return []


def _reader_notes(source: MoeSource, target: Target) -> list[str]:
    """Return where a program does not read what the configuration says.

    Source: the modeling file of Qwen2-MoE in Transformers 5.17 and 5.23, and in vLLM 0.32; llama.cpp as in
    llama-cpp-python 0.3.36.
    """
    config, notes = source.config, []
    if config.norm_topk_prob != target.llama_cpp_norm_topk_prob:
        notes.append(
            f"llama.cpp does not read norm_topk_prob and takes it to be {target.llama_cpp_norm_topk_prob} in "
            f"{target.name}, here it is {config.norm_topk_prob}: a GGUF of this computes something else."
        )
    if target.has_window_per_layer and "sliding_attention" in config.layer_types:
        notes.append(
            f"Transformers applies the sliding windows of {target.name} with sdpa, eager and flex attention, not with "
            "flash attention."
        )
    if len(set(config.layer_types)) > 1:
        notes.append(
            f"vLLM's own {target.name} gives every layer the sliding window, here some have none; {_VLLM_WAY_OUT}"
        )
    if "o_proj" in nonzero_attention_biases(source):
        notes.append(f"vLLM's own {target.name} leaves out the bias of o_proj; {_VLLM_WAY_OUT}")
    if "sliding_attention" in config.layer_types:
        notes.append(
            f"llama.cpp's {target.name} has no sliding window: beyond {config.sliding_window} tokens a GGUF of this "
            "computes something else."
        )
    return notes
