"""What stands in the way of an exact export, and the target that nothing does."""

from dataclasses import dataclass

from modeling_upcycled_moe import UpcycledQwenMoeConfig
from modeling_upcycled_moe.selection_upcycled_moe import SELECTIONS

from ..common.moe_source import MoeSource
from ..common.settings import SettingsError
from .targets import TARGETS, Target


AUTO = "auto"
WAY_OUT = (
    "serve it with its own code (vLLM: --model-impl transformers --trust-remote-code), or make it dense with "
    "`upcycled-moe merge`"
)


@dataclass(frozen=True)
class Choice:
    """The target that a model is exported to, which holds it exactly.

    Args:
        reason: why this one.
        rejected: what stands in the way of those that come before it, by their names.
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
    nowhere = f"{source.name}: no stock architecture computes what this model does"
    if obstacles := model_obstacles(source):
        raise SettingsError(f"{nowhere}: {_sentence(obstacles)}; {WAY_OUT}.")
    biases = nonzero_attention_biases(source)
    by_name = {name: target_obstacles(source.config, target, biases) for name, target in TARGETS.items()}
    exact = [name for name, obstacles in by_name.items() if not obstacles]
    if not exact:
        lost = "; ".join(f"{name}: {_sentence(obstacles)}" for name, obstacles in by_name.items())
        raise SettingsError(f"{nowhere}: {lost}; {WAY_OUT}.")
    if to == AUTO:
        before = list(TARGETS)[: list(TARGETS).index(exact[0])]
        reason = f"the first of {', '.join(TARGETS)} that computes exactly what this model does"
        return Choice(TARGETS[exact[0]], reason, {name: tuple(by_name[name]) for name in before})
    if to not in exact:
        raise SettingsError(f"{source.name}: does not fit {to}: {_sentence(by_name[to])}; give --to {exact[0]}.")
    return Choice(TARGETS[to], "asked for, and exact", {})


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


def _sentence(obstacles: list[str]) -> str:
    return ", and ".join(obstacle.rstrip(".") for obstacle in obstacles)
