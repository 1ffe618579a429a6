"""How alike the outputs of experts are for the same tokens.

Dimensions: L MoE layers, B blocks, S their length, T tokens, H hidden size, C experts with weights of their own.
"""

import math
from collections.abc import Iterator

import torch

from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ...common.moe_layers import MoeLayer, RoutedTokens
from ..results import Figure, MeasureResult
from .domain_means import numbers
from .measure import Measure, Subject
from .pairs import mean_of_pairs


# Tokens of a domain that all experts compute, which costs C / K of what a forward pass does with them.
MAX_TOKENS = 1024

# Tokens of a block among them, evenly spaced, so that they come from many documents.
TOKENS_PER_BLOCK = 32

# Tokens that an expert computes at a time, over batches: an expert of a large model does as much for one in nearly the
# same time.
TOKENS_PER_CALL = 256

# Values of outputs that are held at a time, over experts, tokens and hidden size; in float32 256 MiB.
MAX_VALUES = 2**26

# Of these, values that are held in double precision at a time.
CHUNK_VALUES = 2**22


class ExpertOutputs(Measure):
    """The cosine similarity of the outputs of two experts for the same token, and how far the outputs lie apart.

    All experts compute some tokens of each domain, selected or not: 32 evenly spaced ones of each block, until there
    are 1024. Their outputs count as they are, before routing weights. A pair is left out for tokens to which either
    gives only zeros, for which there is no angle. Experts without computation have no part in it.

    Tables: `similarity` [L][C][C]; None for a pair without tokens. `tokens` [L], how many were computed.

    Source: Router Upcycling (arXiv 2509.00679, section 5.3 and figure 6).
    """

    name = "expert_outputs"
    figures = (
        Figure(
            name="expert_output_similarity",
            title="Cosine similarity of expert outputs",
            formula="mean_{i<j} mean_t cos(y_i(x_t), y_j(x_t))",
            meaning=(
                "1 if all experts compute the same, as copies do; 0 if their outputs are unrelated. Lower means more "
                "specialised experts."
            ),
            source="Router Upcycling (arXiv 2509.00679, section 5.3, figure 6); which tokens is ours",
        ),
        Figure(
            name="expert_output_spread",
            title="Spread of expert outputs",
            formula="mean_t Σ_e ‖y_e(x_t) − ȳ(x_t)‖² / Σ_e ‖y_e(x_t)‖²",
            meaning=(
                "How far outputs lie from the mean of all experts, against their size: 0 if all compute the same, "
                "(C − 1) / C if they are unrelated and of one size. Unlike the cosine it sees differences of size."
            ),
            source="ours",
        ),
    )

    def __init__(self, subject: Subject):
        super().__init__(subject)
        num_layers, num_computed = len(subject.layers), subject.layers[0].num_computed_experts
        dtype = sum_dtype(subject.device)
        self._cosines = torch.zeros(num_layers, num_computed, num_computed, dtype=dtype, device=subject.device)
        self._num_pairs = torch.zeros_like(self._cosines)  # [L, C, C]
        self._spread = torch.zeros(num_layers, dtype=dtype, device=subject.device)
        self._num_spreads = torch.zeros_like(self._spread)  # [L]
        self._num_tokens = [[0] * len(subject.domains) for _ in subject.layers]  # [L][D]
        self._waiting: list[list[torch.Tensor]] = [[] for _ in subject.layers]  # hidden states [T, H] by layer

    @torch.no_grad()
    def update(self, number: int, tokens: RoutedTokens) -> None:
        num_blocks, block_size = tokens.input_ids.shape
        missing = MAX_TOKENS - self._num_tokens[number][tokens.domain]
        if missing <= 0:
            return
        positions = spaced_positions(block_size, TOKENS_PER_BLOCK)
        index = [block * block_size + position for block in range(num_blocks) for position in positions][:missing]
        self._num_tokens[number][tokens.domain] += len(index)
        self._waiting[number].append(tokens.hidden_states[torch.tensor(index, device=tokens.hidden_states.device)])
        self._compute(number, TOKENS_PER_CALL)

    def _compute(self, number: int, num_tokens: int) -> None:
        """Let the experts of a layer compute the tokens that wait, once they are `num_tokens`."""
        if sum(map(len, self._waiting[number])) < num_tokens:
            return
        waiting = torch.cat(self._waiting[number])
        self._waiting[number].clear()
        for outputs in _outputs(self.subject.layers[number], waiting):
            self._add(number, outputs)

    def _add(self, number: int, outputs: torch.Tensor) -> None:
        """Add the outputs [C, T, H] of all experts for some tokens."""
        squares = outputs.square().sum(dim=-1)  # [C, T]
        is_nonzero = (squares > 0).to(self._cosines)
        # Zeros stay zeros.
        directions = outputs / squares.sqrt().clamp(min=torch.finfo(outputs.dtype).tiny)[..., None]
        directions = directions.flatten(1)
        self._cosines[number] += directions @ directions.T
        self._num_pairs[number] += is_nonzero @ is_nonzero.T
        total = squares.sum(dim=0)  # [T]
        # From the first expert, so that copies have a spread of exactly zero.
        deviations = outputs - outputs[:1]
        deviations -= deviations.mean(dim=0)
        spread = deviations.square().sum(dim=(0, -1)) / total
        self._spread[number] += torch.where(total > 0, spread, 0.0).sum()
        self._num_spreads[number] += (total > 0).sum()

    @torch.no_grad()
    def result(self) -> MeasureResult:
        for number, waiting in enumerate(self._waiting):
            if waiting:
                self._compute(number, 1)
        # Rounding must not make a copy more alike than itself.
        similarity = (self._cosines / self._num_pairs).cpu().double().clamp(-1.0, 1.0)
        spread = (self._spread / self._num_spreads).cpu().double()
        has_pairs = similarity.shape[-1] > 1
        return MeasureResult(
            per_layer={
                "expert_output_similarity": numbers(mean_of_pairs(similarity)),
                "expert_output_spread": numbers(spread if has_pairs else torch.full_like(spread, math.nan)),
            },
            tables={"similarity": numbers(similarity), "tokens": [sum(domains) for domains in self._num_tokens]},
            notes=[] if has_pairs else ["One expert with weights: there are no pairs."],
        )


def spaced_positions(block_size: int, num_positions: int) -> list[int]:
    """Return `num_positions` positions, evenly spaced in a block and off its ends; all if it is shorter."""
    num_positions = min(num_positions, block_size)
    # The first token of a document, which attention treats unlike all others, is often at the start of a block.
    return [(2 * at + 1) * block_size // (2 * num_positions) for at in range(num_positions)]


def _outputs(layer: MoeLayer, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the outputs [C, T, H] of all experts for `tokens` [T, H] in double precision, some tokens at a time."""
    values_per_token = layer.num_computed_experts * tokens.shape[-1]
    for part in tokens.split(max(min(TOKENS_PER_CALL, MAX_VALUES // values_per_token), 1)):
        outputs = torch.stack(list(layer.expert_outputs(part)))
        for chunk in outputs.split(max(CHUNK_VALUES // values_per_token, 1), dim=1):
            yield chunk.to(sum_dtype(chunk.device))
