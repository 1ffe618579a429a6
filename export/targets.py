"""The stock architectures that can hold an upcycled model, and what each of them has.

Source: the configurations and modeling files of Qwen2-MoE, Qwen3-MoE and Mixtral in Transformers 5.17 and 5.23, and in
vLLM 0.32; llama.cpp as in llama-cpp-python 0.3.36.
"""

from dataclasses import dataclass

from transformers import MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from modeling_upcycled_moe import UpcycledQwenMoeConfig


@dataclass(frozen=True)
class LlamaCppModel:
    """What llama.cpp has of an architecture. None of the three has dense layers, windows or another activation.

    Args:
        norm_topk_prob: what it takes this to be, whatever the configuration says.
        attention_biases: projections that can have a bias.
        needs_shared_expert: whether it has one in any case.
        needs_own_head: whether the output head is no copy of the embeddings.
        needs_usual_head_dim: whether all heads together are as wide as the hidden state.
    """

    norm_topk_prob: bool
    attention_biases: frozenset[str]
    needs_shared_expert: bool = False
    needs_own_head: bool = False
    needs_usual_head_dim: bool = False


@dataclass(frozen=True)
class Target:
    """A stock architecture.

    Args:
        config_class: of its models.
        class_prefix: that the names of its models begin with.
        attention_biases: projections that can have a bias.
        has_qk_norms: whether queries and keys are normalised per head; none of the three leaves the choice.
        has_window_per_layer: whether some layers can have a sliding window and others none.
        has_dense_layers: whether some layers can keep a dense MLP.
        has_shared_expert: whether each MoE layer has a shared expert, with a gate.
        has_unscaled_weights: whether the weights of the selected experts may sum to less than one.
        block_name: of the MoE block, as its checkpoints name it.
        expert_projections: gate, up and down projection of an expert, likewise.
        num_experts_names: keys of config.json that say how many experts there are, for older readers too.
        llama_cpp: the same architecture there.
        vllm_reads_head_dim: whether vLLM's own class does.
        declares_tokenizer: whether a tokenizer beside it is loaded as the class that it declares.
    """

    config_class: type[PreTrainedConfig]
    class_prefix: str
    attention_biases: frozenset[str]
    has_qk_norms: bool
    has_window_per_layer: bool
    has_dense_layers: bool
    has_shared_expert: bool
    has_unscaled_weights: bool
    block_name: str
    expert_projections: tuple[str, str, str]
    num_experts_names: tuple[str, ...]
    llama_cpp: LlamaCppModel
    vllm_reads_head_dim: bool = True
    declares_tokenizer: bool = True

    @property
    def name(self) -> str:
        """Its model type."""
        return self.config_class.model_type

    def architecture(self, config: UpcycledQwenMoeConfig) -> str:
        """Return the class that holds a model with `config`."""
        return config.architectures[0].replace("UpcycledQwenMoe", self.class_prefix)


# In the order in which `auto` tries them.
TARGETS = {
    target.name: target
    for target in (
        Target(
            config_class=Qwen3MoeConfig,
            class_prefix="Qwen3Moe",
            attention_biases=frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
            has_qk_norms=True,
            has_window_per_layer=False,
            has_dense_layers=True,
            has_shared_expert=False,
            has_unscaled_weights=True,
            block_name="mlp",
            expert_projections=("gate_proj", "up_proj", "down_proj"),
            # Transformers 5 writes the second, and releases before it read the first.
            num_experts_names=("num_experts", "num_local_experts"),
            llama_cpp=LlamaCppModel(norm_topk_prob=True, attention_biases=frozenset({"q_proj", "k_proj", "v_proj"})),
        ),
        Target(
            config_class=Qwen2MoeConfig,
            class_prefix="Qwen2Moe",
            attention_biases=frozenset({"q_proj", "k_proj", "v_proj"}),
            has_qk_norms=False,
            has_window_per_layer=True,
            has_dense_layers=True,
            has_shared_expert=True,
            has_unscaled_weights=True,
            block_name="mlp",
            expert_projections=("gate_proj", "up_proj", "down_proj"),
            num_experts_names=("num_experts",),
            llama_cpp=LlamaCppModel(
                norm_topk_prob=False,
                attention_biases=frozenset({"q_proj", "k_proj", "v_proj"}),
                needs_shared_expert=True,
                needs_own_head=True,
                needs_usual_head_dim=True,
            ),
            vllm_reads_head_dim=False,
        ),
        Target(
            config_class=MixtralConfig,
            class_prefix="Mixtral",
            attention_biases=frozenset(),
            has_qk_norms=False,
            has_window_per_layer=False,
            has_dense_layers=False,
            has_shared_expert=False,
            has_unscaled_weights=False,
            block_name="block_sparse_moe",
            expert_projections=("w1", "w3", "w2"),
            num_experts_names=("num_local_experts",),
            llama_cpp=LlamaCppModel(norm_topk_prob=True, attention_biases=frozenset()),
            declares_tokenizer=False,
        ),
    )
}
