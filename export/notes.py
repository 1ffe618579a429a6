"""What someone should know of an export that is exact."""

from ..common.moe_source import MoeSource
from .readers import reader_notes
from .targets import Target


# Fields that act in training only, and which no stock architecture has; Mixtral's jitter is another one.
TRAINING_FIELDS = (
    "router_z_loss_coef",
    "router_entropy_loss_coef",
    "router_locality_loss_coef",
    "router_jitter_noise",
)


def export_notes(source: MoeSource, target: Target) -> tuple[str, ...]:
    """Return what changes hands in the export of `source` to `target`, a sentence each."""
    config = source.config
    notes = []
    if config.router_type != "linear":
        notes.append(
            f"router_type={config.router_type!r} is folded into one linear router a layer, computed in float64 and "
            "stored in float32: the same logits up to rounding."
        )
        if config.router_dtype is None:
            notes.append(
                "a folded router is one product where the model's own are two: in bfloat16 it rounds otherwise, and "
                "near-ties may go to another expert; in float32 all is the same."
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
    return (*notes, *reader_notes(source, target))


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
