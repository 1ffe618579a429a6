"""What programs make of an exported checkpoint where they do not read, or do not have, what its configuration says.

Source: the modeling files of the three architectures in Transformers 5.17 and 5.23, and in vLLM 0.32; converter and
models of llama.cpp as in llama-cpp-python 0.3.36.
"""

from ..common.moe_source import MoeSource
from .obstacles import nonzero_attention_biases
from .targets import Target


# What vLLM's flag --model-impl takes: its own classes, or those of Transformers.
VLLM, TRANSFORMERS = "vllm", "transformers"

# The activation of all Qwen models.
SILU = "silu"


def reader_notes(source: MoeSource, target: Target) -> list[str]:
    """Return what a program makes otherwise of the export of `source` to `target`, a sentence each."""
    notes = []
    if target.has_window_per_layer and "sliding_attention" in source.config.layer_types:
        notes.append(
            f"Transformers applies the sliding windows of {target.name} with sdpa, eager and flex attention, not with "
            "flash attention."
        )
    return [*notes, *_vllm_notes(source, target), *_llama_cpp_notes(source, target)]


def vllm_model_impl(source: MoeSource, target: Target) -> str | None:
    """Return the `--model-impl` with which vLLM computes the same, None if it does with neither."""
    if source.config.hidden_act != SILU:
        return None
    if not _vllm_deviations(source, target):
        return VLLM
    return None if _has_empty_shared_expert(source, target) else TRANSFORMERS


def _vllm_notes(source: MoeSource, target: Target) -> list[str]:
    config = source.config
    if config.hidden_act != SILU:
        return [
            f"vLLM's fused experts have {SILU} whatever hidden_act says, here {config.hidden_act}, with --model-impl "
            "transformers too: vLLM computes something else; serve it with `transformers serve`."
        ]
    way_out = f"serve it there with --model-impl {TRANSFORMERS}"
    if _has_empty_shared_expert(source, target):
        way_out = (
            f"with --model-impl {TRANSFORMERS} it stops at a shared expert of width 0 on a CPU; serve the upcycled "
            "checkpoint there, with its own code"
        )
    return [f"vLLM's own {target.name} {deviation}; {way_out}." for deviation in _vllm_deviations(source, target)]


def _vllm_deviations(source: MoeSource, target: Target) -> list[str]:
    """Return what vLLM's own class computes otherwise, and Transformers' class in vLLM does not."""
    config, deviations = source.config, []
    if len(set(config.layer_types)) > 1:
        deviations.append("gives every layer the sliding window, here some have none")
    if "o_proj" in nonzero_attention_biases(source):
        deviations.append("leaves out the bias of o_proj")
    if not target.vllm_reads_head_dim and not _has_usual_head_dim(source):
        deviations.append(f"does not read head_dim, here {config.head_dim}, and cuts the heads short")
    return deviations


def _llama_cpp_notes(source: MoeSource, target: Target) -> list[str]:
    if obstacles := _llama_cpp_obstacles(source, target):
        return [f"llama.cpp cannot load this: {', and '.join(obstacles)}."]
    config, deviations = source.config, []
    if config.norm_topk_prob != target.llama_cpp.norm_topk_prob:
        deviations.append(
            f"does not read norm_topk_prob and takes it to be {target.llama_cpp.norm_topk_prob} in {target.name}, "
            f"here it is {config.norm_topk_prob}"
        )
    if "sliding_attention" in config.layer_types:
        deviations.append(f"has no sliding window in {target.name}, here it is {config.sliding_window} tokens")
    if config.hidden_act != SILU:
        deviations.append(f"has {SILU} in {target.name} whatever hidden_act says, here {config.hidden_act}")
    return [f"llama.cpp {deviation}: a GGUF of this computes something else." for deviation in deviations]


def _llama_cpp_obstacles(source: MoeSource, target: Target) -> list[str]:
    """Return why its converter or library refuse the export."""
    config, model, obstacles = source.config, target.llama_cpp, []
    num_dense = config.num_hidden_layers - len(config.moe_layers)
    if not config.architectures[0].endswith("ForCausalLM"):
        obstacles.append("it has no classifiers of this kind")
    if model.needs_shared_expert and config.shared_expert_intermediate_size == 0:
        obstacles.append(f"its {target.name} needs a shared expert, and here is none")
    if model.needs_own_head and config.tie_word_embeddings:
        obstacles.append(f"its {target.name} needs an output head, and here it is tied to the embeddings")
    if model.needs_usual_head_dim and not _has_usual_head_dim(source):
        obstacles.append(f"its {target.name} does not read head_dim, here {config.head_dim}")
    if config.attention_bias and (lost := target.attention_biases - model.attention_biases):
        obstacles.append(f"its {target.name} has no attention bias on {', '.join(sorted(lost))}")
    if num_dense > 0:
        obstacles.append(
            f"all layers of its {target.name} have experts, and here {num_dense} of {config.num_hidden_layers} are "
            "dense"
        )
    return obstacles


def _has_usual_head_dim(source: MoeSource) -> bool:
    config = source.config
    return config.head_dim * config.num_attention_heads == config.hidden_size


def _has_empty_shared_expert(source: MoeSource, target: Target) -> bool:
    return target.has_shared_expert and source.config.shared_expert_intermediate_size == 0
