"""The report of a study: tables in Markdown, pictures of the loss, and `results.json`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from intervals import Interval
from loss_pictures import draw_losses
from study_settings import ALL_DOMAINS, StudySettings

from upcycled_moe.common.numbers import format_count
from upcycled_moe.common.output_folder import FolderKind, staged
from upcycled_moe.common.pictures import INSTALL, can_draw


RESULTS_FILE, REPORT_FILE = "results.json", "report.md"
# Figures of the analysis that the report shows, with their headings; `results.json` has all.
FIGURES = {
    "routing_weights.routing_diversity": "routing diversity",
    "routing_weights.domain_divergence": "domain divergence",
    "domains.domain_specialization": "domain specialisation",
    "expert_outputs.expert_output_similarity": "output similarity",
    "expert_weights.parent_divergence": "distance from parent",
    "routing.max_violation": "load, largest ÷ mean − 1",
    "routing.dead_experts": "dead experts",
    "routing.logit_std": "logit std",
}
# Losses differ in the fourth decimal; figures are of any size.
LOSS_DECIMALS = 4
JSON_DECIMALS = 6
# A primary comparison is decided below this corrected p-value.
SIGNIFICANCE = 0.05
REPORT = FolderKind("report of a study", (RESULTS_FILE,))


def write_report(study: StudySettings, results: Mapping[str, Any], folder: Path) -> Path:
    """Write the report of `study` into `folder`, all of it or nothing, and return the path of its page."""
    with staged(folder, kind=REPORT) as partial:
        (partial / RESULTS_FILE).write_text(json.dumps(_rounded(results)) + "\n", encoding="utf-8")
        pictures = {}
        if can_draw():
            pictures = {
                parent: draw_losses(found, study.baseline, parent, partial / f"loss_{parent}.png")
                for parent, found in results["parents"].items()
            }
        page = "\n".join(report_lines(study, results, pictures)) + "\n"
        (partial / REPORT_FILE).write_text(page, encoding="utf-8")
    return folder / REPORT_FILE


def report_lines(study: StudySettings, results: Mapping[str, Any], pictures: Mapping[str, Path]) -> list[str]:
    """Return the lines of the page."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"# {study.title}",
        "",
        f"Seeds {', '.join(map(str, study.seeds))}; ± is half of a 95 % confidence interval over them (t "
        f"distribution{', wide with so few' if len(study.seeds) < 5 else ''}). A seed draws the order of the text and "
        "the routers that are random; routers out of attention heads draw nothing, so their runs differ in the order "
        "only. A difference is paired: both runs of a seed saw the same blocks in the same order. Losses are in nats "
        f"per token of validation text{_validation_size(study)}, without router losses. **Bold**: the interval of a "
        "difference excludes zero; only the primary comparisons are corrected for how many there are.",
        "",
        f"{results['wall_seconds'] / 60:.0f} minutes in all, with whatever else the machine did. {versions}.",
    ]
    if any(found["primary_comparisons"] for found in results["parents"].values()):
        lines += ["", *_primary_lines(results["parents"])]
    if not pictures:
        lines += ["", f"No pictures: {INSTALL}."]
    for parent, found in results["parents"].items():
        lines += ["", *_parent_lines(study, parent, found, pictures.get(parent))]
    return lines


def _validation_size(study: StudySettings) -> str:
    if (num_blocks := study.training.get("max_eval_blocks")) is None:
        return ""
    num_tokens = num_blocks * study.training["block_size"] * len(study.text.domains)
    return f" (at most {num_tokens:,} tokens, as many of each domain)"


def _primary_lines(parents: Mapping[str, Any]) -> Iterator[str]:
    yield "## Primary comparisons"
    yield ""
    yield (
        "Final loss of the first less that of the second. p: paired t-test, corrected for all rows of this table "
        f"(Holm). A row is undecided at {SIGNIFICANCE:g} or above."
    )
    yield ""
    rows = (
        [
            *(found["methods"][pair[side]]["title"] for side in ("first", "second")),
            f"`{parent}`",
            format_difference(Interval(**pair["difference"][ALL_DOMAINS])),
            _p_value(pair.get("corrected_p_value")),
            _verdict(pair),
        ]
        for parent, found in parents.items()
        for pair in found["primary_comparisons"]
    )
    yield from _table(["first", "second", "parent", "difference", "p", "lower loss"], rows)


def _p_value(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _verdict(pair: Mapping[str, Any]) -> str:
    if pair.get("corrected_p_value") is None or pair["corrected_p_value"] >= SIGNIFICANCE:
        return "undecided"
    return "first" if pair["difference"][ALL_DOMAINS]["mean"] < 0 else "second"


def _parent_lines(study: StudySettings, parent: str, found: Mapping[str, Any], picture: Path | None) -> Iterable[str]:
    tokens = format_count(next(iter(found["methods"].values()))["tokens"])
    yield f"## Parent `{parent}`"
    yield ""
    yield (
        f"Trained on {format_count(found['tokens'])} tokens to a loss of "
        f"{found['loss'][ALL_DOMAINS]:.{LOSS_DECIMALS}f}; each method then on {tokens}."
    )
    yield ""
    yield from _overview(study.baseline, found["methods"])
    if picture is not None:
        yield from ("", f"![Validation loss over tokens, parent {parent}]({picture.name})")
    domains = [domain for domain in found["loss"] if domain != ALL_DOMAINS]
    yield from ("", f"Final loss by domain, less that of `{study.baseline}` (whose loss itself is in its row):", "")
    yield from _domain_table(study.baseline, found["methods"], domains)
    if pairs := [*found["primary_comparisons"], *found["comparisons"]]:
        yield from ("", "Final loss of the first less that of the second, not corrected:", "")
        yield from _comparison_table(found["methods"], pairs, [ALL_DOMAINS, *domains])
    yield from ("", "What the routers do after training, means over layers and seeds:", "")
    yield from _router_table([method for method in found["methods"].values() if method["figures"]])


def _overview(baseline: str, methods: Mapping[str, Any]) -> Iterable[str]:
    header = ["method", "parameters", "active", "MFLOPs / token", "final loss", f"less {baseline}", "CPU s / run"]
    return _table(header, map(_overview_row, methods.values()))


def _domain_table(baseline: str, methods: Mapping[str, Any], domains: Sequence[str]) -> Iterable[str]:
    rows = (
        [method["title"], *(_domain_cell(method, domain, name == baseline) for domain in domains)]
        for name, method in methods.items()
    )
    return _table(["method", *domains], rows)


def _comparison_table(
    methods: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], domains: Sequence[str]
) -> Iterable[str]:
    rows = (
        [
            *(methods[pair[side]]["title"] for side in ("first", "second")),
            *(format_difference(Interval(**pair["difference"][domain])) for domain in domains),
        ]
        for pair in pairs
    )
    return _table(["first", "second", *domains], rows)


def _router_table(methods: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    shown = {key: title for key, title in FIGURES.items() if any(key in method["figures"] for method in methods)}
    rows = (
        [method["title"], _start_cell(method), *(_figure_cell(method["figures"].get(key)) for key in shown)]
        for method in methods
    )
    return _table(["method", "logit std at the start", *shown.values()], rows)


def _overview_row(method: Mapping[str, Any]) -> list[str]:
    seconds = [run["cpu_seconds"] for run in method["runs"].values()]
    return [
        method["title"],
        format_count(method["total_parameters"]),
        format_count(method["active_parameters"]),
        f"{method['flops_per_token'] / 1e6:.1f}",
        format_interval(Interval(**method["loss"][ALL_DOMAINS])),
        format_difference(Interval(**method["difference"][ALL_DOMAINS])),
        f"{sum(seconds) / len(seconds):.0f}",
    ]


def _domain_cell(method: Mapping[str, Any], domain: str, is_baseline: bool) -> str:
    if is_baseline:
        return format_interval(Interval(**method["loss"][domain]))
    return format_difference(Interval(**method["difference"][domain]))


def _start_cell(method: Mapping[str, Any]) -> str:
    values = [run["initial_logit_std"] for run in method["runs"].values()]
    return "" if None in values else f"{sum(values) / len(values):.3g}"


def _figure_cell(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else f"{interval['mean']:.3g}{_half_width(interval['half_width'], '.2g')}"


def format_interval(interval: Interval) -> str:
    """Return a loss as `3.1234 ± 0.0123`."""
    return f"{interval.mean:.{LOSS_DECIMALS}f}{_half_width(interval.half_width, f'.{LOSS_DECIMALS}f')}"


def format_difference(interval: Interval) -> str:
    """Return a difference with its sign, bold if its interval excludes zero; empty for the baseline's own."""
    if interval.mean == 0 and not interval.half_width:
        return ""
    text = f"{interval.mean:+.{LOSS_DECIMALS}f}{_half_width(interval.half_width, f'.{LOSS_DECIMALS}f')}"
    return f"**{text}**" if interval.excludes_zero else text


def _half_width(half_width: float | None, form: str) -> str:
    return "" if half_width is None else f" ± {half_width:{form}}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _rounded(content: Any) -> Any:
    """Return `content` with its floats rounded to what is worth keeping."""
    if isinstance(content, float):
        return round(content, JSON_DECIMALS)
    if isinstance(content, Mapping):
        return {key: _rounded(value) for key, value in content.items()}
    return [_rounded(value) for value in content] if isinstance(content, list) else content
