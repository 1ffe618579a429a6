"""The stock architectures that can hold an upcycled model, and what each of them cannot.

Source: the configurations and modeling files of Qwen2-MoE, Qwen3-MoE and Mixtral in Transformers 5.17 and 5.23.
"""

from dataclasses import dataclass

from transformers import MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from modeling_upcycled_moe import UpcycledQwenMoeConfig
from modeling_upcycled_moe.selection_upcycled_moe import SELECTIONS

from ..common.moe_source import MoeSource
from ..common.settings import SettingsError


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
        llama_cpp_norm_topk_prob: what llama.cpp takes `norm_topk_prob` to be, whatever the configuration says.
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
    llama_cpp_norm_topk_prob: bool
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
            llama_cpp_norm_topk_prob=True,
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
            llama_cpp_norm_topk_prob=False,
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
            llama_cpp_norm_topk_prob=True,
            declares_tokenizer=False,
        ),
    )
}
AUTO = "auto"
WAY_OUT = (
    "serve it with its own code (vLLM: --model-impl transformers --trust-remote-code), or make it dense with "
    "`upcycled-moe merge`"
)


@dataclass(frozen=True)
class Choice:
    """The target that holds a model exactly.

    Args:
        reason: why this one.
        rejected: what stands in the way of the others that were looked at, by their names.
    """

    target: Target
    reason: str
    rejected: dict[str, tuple[str, ...]]


def choose_target(source: MoeSource, to: str) -> Choice:
    """Return the target `to`, or with `auto` the first one, that computes exactly what `source` does.

    Raises:
        SettingsError: if there is none; it says what each target would lose.
    """
    if to != AUTO and to not in TARGETS:
        raise SettingsError(f"to={to!r} is no architecture to export to; allowed: {', '.join(TARGETS)}, {AUTO}.")
    if obstacles := model_obstacles(source):
        raise SettingsError(
            f"{source.name}: no stock architecture computes what this model does: {_sentence(obstacles)}; {WAY_OUT}."
        )
    biases = nonzero_attention_biases(source)
    rejected: dict[str, tuple[str, ...]] = {}
    for name in TARGETS if to == AUTO else [to]:
        obstacles = target_obstacles(source.config, TARGETS[name], biases)
        if not obstacles:
            first = f"the first of {', '.join(TARGETS)} that computes exactly what this model does"
            return Choice(TARGETS[name], first if to == AUTO else "asked for, and exact", rejected)
        rejected[name] = tuple(obstacles)
    lost = "; ".join(f"{name}: {_sentence(obstacles)}" for name, obstacles in rejected.items())
    if to != AUTO:
        raise SettingsError(f"{source.name}: does not fit {lost}; try --to {AUTO}, or {WAY_OUT}.")
    raise SettingsError(f"{source.name}: no stock architecture computes what this model does: {lost}; {WAY_OUT}.")


def model_obstacles(source: MoeSource) -> list[str]:
    """Return what in `source` no stock architecture has."""
    config, obstacles = source.config, []
    selection = SELECTIONS[config.router_selection].in_evaluation or config.router_selection
    if config.num_routed_experts > config.num_experts:
        obstacles.append(
            f"{config.num_routed_experts - config.num_experts} of its experts are without computation "
            "(num_zero_experts, num_copy_experts, num_constant_experts)"
        )
    if config.router_score_function != "softmax":
        obstacles.append(f"experts are scored by router_score_function={config.router_score_function!r}, not softmax")
    if selection != "top_k":
        obstacles.append(f"experts are selected by router_selection={config.router_selection!r}, not top_k")
    if has_router_biases(source):
        obstacles.append("the biases that its experts are selected by (use_router_bias) are not zero")
    if config.shared_expert_intermediate_size > 0 and config.shared_expert_gating == "complement":
        obstacles.append("shared_expert_gating='complement' weights the shared expert by what routing leaves")
    if fold_obstacle := source.router(config.moe_layers[0]).fold_obstacle:
        obstacles.append(fold_obstacle)
    return obstacles


def target_obstacles(config: UpcycledQwenMoeConfig, target: Target, biases: frozenset[str]) -> list[str]:
    """Return what stands in the way of a model with `config` in `target`, beside what no target has.

    Args:
        biases: attention projections whose biases are not all zero.
    """
    obstacles = []
    if config.base_model_type == "qwen3" and not target.has_qk_norms:
        obstacles.append("it has no q/k norms, and this model normalises queries and keys")
    if config.base_model_type != "qwen3" and target.has_qk_norms:
        obstacles.append("it normalises queries and keys, and this model does not")
    if lost := biases - target.attention_biases:
        obstacles.append(f"it has no attention bias on {', '.join(sorted(lost))}, and this model's are not zero")
    num_sliding = config.layer_types.count("sliding_attention")
    if 0 < num_sliding < config.num_hidden_layers and not target.has_window_per_layer:
        obstacles.append(
            f"its sliding window is one for all layers, and here {num_sliding} of {config.num_hidden_layers} have one"
        )
    num_dense = config.num_hidden_layers - len(config.moe_layers)
    if num_dense > 0 and not target.has_dense_layers:
        obstacles.append(f"all its layers have experts, and here {num_dense} of {config.num_hidden_layers} are dense")
    if config.shared_expert_intermediate_size > 0 and not target.has_shared_expert:
        obstacles.append(f"it has no shared expert, here {config.shared_expert_intermediate_size} wide")
    if not config.norm_topk_prob and not target.has_unscaled_weights:
        obstacles.append("it scales the weights of the selected experts to sum to one, and norm_topk_prob is false")
    return obstacles


def has_router_biases(source: MoeSource) -> bool:
    """Return whether any bias that experts are selected by is not zero."""
    return any(
        bool(tensor.load().any())
        for name, tensor in source.tensors.items()
        if name.endswith(".e_score_correction_bias")
    )


def nonzero_attention_biases(source: MoeSource) -> frozenset[str]:
    """Return the attention projections with a bias that is not zero in some layer; reads the biases."""
    return frozenset(
        tensor.name.split(".")[-2]
        for tensor in source.tensors.values()
        if tensor.name.endswith("_proj.bias") and tensor.load().any()
    )


def _sentence(obstacles: list[str] | tuple[str, ...]) -> str:
    return ", and ".join(obstacle.rstrip(".") for obstacle in obstacles)
