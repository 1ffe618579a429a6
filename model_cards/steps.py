"""What was done to a checkpoint, step by step, in words."""

from collections.abc import Callable, Mapping
from typing import Any

from ..common.numbers import perplexity
from .checkpoint import Checkpoint, Parent, parent_of
from .training import last_name


def described_steps(checkpoint: Checkpoint) -> list[str]:
    """Return a sentence in Markdown for each step that led to `checkpoint`, the conversion first."""
    sentences = []
    if checkpoint.recipe:
        sentences.append(f"**convert** {_conversion(checkpoint)}")
    return sentences + [f"**{step['command']}** {_described(step)}" for step in checkpoint.steps]


def joined(parents: list[Parent]) -> str:
    """Return the links of several models in Markdown."""
    return ", ".join(parent.link for parent in parents)


def num_active_experts(checkpoint: Checkpoint) -> str:
    """Return how many experts a token goes to."""
    description = checkpoint.description if checkpoint.is_upcycled else {}
    is_less = str(description.get("num_active", "")).startswith("at most")
    return "at most " * is_less + str(checkpoint.config["num_experts_per_tok"])


def _conversion(checkpoint: Checkpoint) -> str:
    recipe, description = checkpoint.recipe, checkpoint.description
    made = "in the shape of" if checkpoint.is_from_scratch else "from"
    text = f"{made} {joined(checkpoint.parents)}"
    if not description:
        return f"{text}: {recipe['num_experts']} experts a layer, {recipe['num_experts_per_tok']} active."
    lines = description["lines"]
    details = {
        "Experts": lines["Experts"],
        "Shared expert": lines.get("Shared expert"),
        "Routers": description["router"],
    }
    return f"{text}. {' '.join(f'{name}: {value}.' for name, value in details.items() if value)}"


def _train(step: Mapping[str, Any]) -> str:
    text = f"for {plural(step['steps'], 'step')}"
    if step.get("best_of_steps"):
        text += f" (the best of {plural(step['best_of_steps'], 'step')})"
    if step.get("tokens"):
        text += f", {step['tokens']:,} tokens"
    if step.get("pairs"):
        epochs = "1 epoch" if step["epochs"] == 1 else f"{step['epochs']:.3g} epochs"
        text += f", {epochs} of {plural(step['pairs'], 'preference pair')}"
        if step.get("flip_rate"):
            text += f" with the answers of {step['flip_rate']:.1%} of them exchanged (label noise)"
    if step.get("data"):
        text += f", on {listed(step['data'])}"
    if (pairs := (step.get("preference") or {}).get("all")) is not None:
        text += f"; right on {pairs['accuracy']:.1%} of pairs{evaluated_at(step)}"
    if (loss := step.get("evaluation", {}).get("all")) is not None:
        text += f"; validation loss {loss:.4f}{evaluated_at(step)}"
    return f"{text}."


def evaluated_at(step: Mapping[str, Any]) -> str:
    """Return when the evaluation of a training was, as a sentence goes on; nothing where that was not recorded."""
    at = step.get("evaluation_step")
    if at is None:
        return ""
    return " at the end" if at == step["steps"] else f" at step {at:,}"


def _export(step: Mapping[str, Any]) -> str:
    return f"to {step['architecture']}, a class of Transformers' own: {step['reason'].rstrip('.')}."


def _prune(step: Mapping[str, Any]) -> str:
    before, after = step["num_experts"]["before"], step["num_experts"]["after"]
    text = f"{before} experts a layer to {after}, by `{step['method']}`"
    active = step.get("num_experts_per_tok", {})
    if active and active["before"] != active["after"]:
        text += f", with {active['after']} active instead of {active['before']}"
    losses = [(step.get("loss") or {}).get(name) or {} for name in ("before", "after")]
    if all("mean" in loss for loss in losses):
        before, after = (perplexity(loss["mean"]) for loss in losses)
        text += f"; perplexity {before:,.2f} before, {after:,.2f} after"
    return f"{text}."


def _merge(step: Mapping[str, Any]) -> str:
    method, others = step["method"], step.get("other_sources")
    if others:
        text, how = f"with {joined([parent_of(source) for source in others])}", _MERGES_OF_CHECKPOINTS.get(method)
    else:
        text, how = "back to a dense model", _MERGES.get(method)
    return f"{text}, by `{method}`{f': {how}' * (how is not None)}{_learned(step)}."


def _learned(step: Mapping[str, Any]) -> str:
    """Return what learning the coefficients of a merge gained, as a sentence goes on; nothing if they were not."""
    fit, learn = step.get("fit"), step.get("learn")
    if not fit or not learn:
        return ""
    before, after = fit["heldout"]["before"], fit["heldout"]["after"]
    changes = ", ".join(
        f"{name} {f'{before[name]:.4f} to ' if name in before else ''}{value:.4f}" for name, value in after.items()
    )
    # What is on the Hub was known when it was read.
    data = learn.get("shown_data") or list(map(last_name, learn["data"]["data"]))
    return (
        f". They were learned on {listed(data)} by `{learn['fit']['loss']}`, and moved by up to "
        f"{fit['largest_move']:.3f}; on what was held out: {changes}"
    )


_MERGES = {
    "average": "each FFN is the mean of the experts of its layer",
    "usage": "each FFN is a mean of the experts of its layer, weighted by what the routers give them on text",
    "coefficients": "each FFN is a sum of the experts of its layer, with coefficients that were given",
    "shared": "each FFN is the shared expert of its layer",
    "learned": "each FFN is a sum of the experts of its layer, with learned coefficients",
}
_MERGES_OF_CHECKPOINTS = {
    "average": "each weight is the mean of theirs",
    "coefficients": "each weight is a sum of theirs, with coefficients that were given",
    "learned": "each weight is a sum of theirs, with learned coefficients",
}


def _described(step: Mapping[str, Any]) -> str:
    try:
        return _STEPS.get(step["command"], _other)(step)
    # Other versions record other facts.
    except (KeyError, TypeError, ValueError, AttributeError):
        return _other(step)


def _other(step: Mapping[str, Any]) -> str:
    """Describe a step that this version does not know, by those of its facts that fit into a line."""
    facts = [
        f"{name} {value}" for name, value in step.items() if name != "command" and isinstance(value, str | int | float)
    ]
    of = f"of {parent_of(step['source']).link}" if step.get("source") else ""
    return f"{of}{': ' * bool(of and facts)}{', '.join(facts)}." if of or facts else "(no details)."


_STEPS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "train": _train,
    "export": _export,
    "prune": _prune,
    "merge": _merge,
}


def plural(count: int, noun: str) -> str:
    """Return `1 step`, `2,000 steps`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def listed(names: list[str]) -> str:
    """Return sources of text in Markdown."""
    return ", ".join(f"`{name}`" for name in names)
