"""What a model computes that was not trained yet."""

from .checkpoint import Checkpoint


_DTYPES = {"BF16": "bfloat16", "F16": "float16"}


def state(checkpoint: Checkpoint) -> str | None:
    """Return what a model computes that was only converted, or did then; None for one that was trained since."""
    description = checkpoint.description
    if not description or checkpoint.is_trained:
        return None
    level, reason = description["preserves_function"], description["preservation_reason"]
    # Later steps may change what it computes.
    is_fresh = not checkpoint.steps
    if checkpoint.is_from_scratch:
        return f"**{'Freshly made' if is_fresh else 'Never trained'}:** {reason}. It has to be trained from the start."
    parents = "its parent computes" if len(checkpoint.parents) == 1 else "any of its parents computes"
    verbs = {"exact": ("computes", "computed"), "approximate": ("computes nearly", "computed nearly")}
    now, then = verbs.get(level, ("does not compute", "did not compute"))
    is_exact = level == "exact"
    why, training = ("", "Its worth comes with training.") if is_exact else (f": {reason}", "It has to be trained.")
    if not is_fresh:
        return f"**Not trained** since the conversion, after which it {then} what {parents}{why}. {training}"
    if is_exact:
        return f"**Freshly converted:** it {now} what {parents}{_rounding(checkpoint)}. {training}"
    return f"**Freshly converted,** it {now} what {parents}{why}. {training}"


def _rounding(checkpoint: Checkpoint) -> str:
    """Return what is added for weights that are not in float32, where a sum over experts is rounded."""
    dtypes = [] if checkpoint.weights is None else checkpoint.weights.dtypes
    names = [_DTYPES[dtype] for dtype in dtypes if dtype in _DTYPES]
    return f", up to rounding in {' and '.join(names)}" if names else ""
