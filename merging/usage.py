"""Coefficients from what the routers do with text.

Dimensions: T tokens, E experts to choose from, C of them with weights, K slots of a token, L MoE layers.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ..common.checkpoints import load_model
from ..common.devices import best_device
from ..common.labelled_text import Block
from ..common.moe_layers import MoeLayer, RoutedTokens, find_moe_layers
from ..common.moe_source import MoeSource
from ..common.progress import Progress
from ..common.routing_pass import run_pass
from ..common.settings import SettingsError
from ..common.text_blocks import check_tokens, load_text_tokenizer, read_blocks
from ..common.text_settings import TextSettings
from .coefficients import MergeCoefficients
from .layout import ExpertLayout


class ExpertUsage:
    """Sums up what the outputs of experts are multiplied with.

    Args:
        model: one of ours; its MoE blocks know what the shared expert weighs.
        layers: its MoE layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer]):
        self.blocks = [model.base_model.layers[layer.index].mlp for layer in layers]
        shape = (len(layers), layers[0].num_experts + 1)
        self.routed = torch.zeros(shape, dtype=sum_dtype(model.device), device=model.device)  # [L, E + 1]
        self.shared = torch.zeros(shape[0], dtype=self.routed.dtype, device=model.device)  # [L]

    def update(self, number: int, tokens: RoutedTokens) -> None:
        """Add the weights of a batch in MoE layer `number`; see `RoutingObserver`."""
        weights = tokens.weights.to(self.routed.dtype)
        self.routed[number].index_add_(0, tokens.selected.flatten(), weights.flatten())
        if self.blocks[number].shared_expert is not None:
            shared = torch.as_tensor(self.blocks[number].shared_weight(tokens.hidden_states, tokens.router_logits))
            self.shared[number] += shared.to(self.shared).expand(len(weights), 1).sum()

    def coefficients(self, layout: ExpertLayout) -> MergeCoefficients:
        """Return the mean weights, as shares of what all experts with weights have.

        The weight of an expert is what the model multiplies its output with, and a choice counts as much as it moves
        the output; a share of selections would count the second choice as much as the first. λ is that of the shared
        expert against all, of FFNs as they were before conversion halved their outputs. This is our reading.

        Raises:
            SettingsError: if no token went to any expert of a slice.
        """
        layers, shared = {}, {}
        for layer_idx, routed, shared_sum in zip(
            layout.moe_layers, self.routed.tolist(), self.shared.tolist(), strict=True
        ):
            routed = routed[: layout.num_experts]
            for number in range(layout.num_slices):
                if sum(routed[expert] for expert in layout.slice_of(number)) == 0:
                    what = f" of slice {number}" * (layout.num_slices > 1)
                    raise SettingsError(
                        f"layer {layer_idx}: no token went to any expert{what} that has weights; give more text, or "
                        "another method."
                    )
            total = sum(routed)
            layers[layer_idx] = [value / total for value in routed]
            if layout.has_shared_expert:
                shared_total, routed_total = shared_sum * layout.shared_factor, total * layout.routed_factor
                shared[layer_idx] = shared_total / (shared_total + routed_total)
        return MergeCoefficients.alike(layers, shared if layout.has_shared_expert else None)


def measure_coefficients(
    source: MoeSource, layout: ExpertLayout, text: TextSettings, progress: Progress
) -> tuple[MergeCoefficients, dict[str, int]]:
    """Return the coefficients by what the routers of `source` do with `text`, and its tokens by domain.

    Raises:
        SettingsError: if the text does not fit the model, or a router does not use its experts.
    """
    tokenizer = load_text_tokenizer(source)
    block_size = text.block_size_for({source.name: source.config.max_position_embeddings})
    domains = read_blocks(text, tokenizer, block_size)
    coefficients = coefficients_by_usage(source, layout, domains, text.batch_size, text.dtype, progress)
    return coefficients, {name: sum(len(block["input_ids"]) for block in blocks) for name, blocks in domains.items()}


def coefficients_by_usage(
    source: MoeSource,
    layout: ExpertLayout,
    domains: dict[str, list[Block]],
    batch_size: int,
    dtype: str,
    progress: Progress,
) -> MergeCoefficients:
    """Return the coefficients by what the routers of `source` do with the blocks of all `domains`.

    The whole model runs, by the code of this package. All tokens count alike.

    Raises:
        SettingsError: if the text does not fit the model, or a router does not use its experts.
    """
    check_tokens(source.name, domains, source.config)
    model = load_model(str(source.folder), source.config, dtype=dtype, device=best_device(), own_code=False)
    layers = find_moe_layers(model)
    usage = ExpertUsage(model, layers)
    with progress.task("Routing text", sum(map(len, domains.values())), "blocks") as advance:
        run_pass(model, layers, domains, [usage], batch_size, advance)
    return usage.coefficients(layout)
