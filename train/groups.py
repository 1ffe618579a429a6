"""Which part of a model a parameter belongs to, by its name."""

# The first of these that has a part of the name decides; parts are what stands between dots.
_PARTS = (
    ("embeddings", {"embed_tokens"}),
    ("head", {"lm_head", "score"}),
    ("routers", {"gate"}),
    ("experts", {"experts", "constant_experts"}),
    ("attention", {"self_attn", "linear_attn"}),
    ("mlp", {"mlp", "shared_expert", "shared_expert_gate"}),
)

PARAMETER_GROUPS = ("embeddings", "attention", "routers", "experts", "mlp", "norms", "head", "other")


def parameter_group(name: str) -> str:
    """Return which of `PARAMETER_GROUPS` a parameter belongs to.

    `experts` are the routed ones; `mlp` is the shared expert with its gate, and the MLP of dense layers and models.
    Wrappers (DDP, FSDP, `torch.compile`, adapters) that add parts to the name change nothing. An output head that is
    tied is the embedding.

    Args:
        name: as in `named_parameters` of a dense Qwen model, an upcycled one, or a stock Qwen MoE one.
    """
    parts = name.split(".")
    # Before the rest: attention and routers have norms of their own.
    if any(part == "norm" or part.endswith(("_norm", "layernorm")) for part in parts):
        return "norms"
    return next((group for group, found in _PARTS if found.intersection(parts)), "other")
