"""The report of a study: tables in Markdown, the curves of each world, and `results.json`."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from upcycled_moe.common.output_folder import FolderKind, staged

from ..router_upcycling.intervals import Interval, mean_interval
from .files import CURVES_FOLDER, curves_task
from .model_stages import AVERAGE, LEARNED, SHARED
from .plan import DENSE, METHODS, MOE


RESULTS_FILE, REPORT_FILE = "results.json", "report.md"
PICTURE_FILE = "curves.png"
REPORT = FolderKind("report of a study", (RESULTS_FILE,))
TITLES = {
    DENSE: "Dense",
    MOE: "MoE",
    SHARED: "Shared expert only",
    AVERAGE: "Merged, uniform",
    LEARNED: "Merged, learned",
    "ensemble_mean": "Ensemble of dense seeds, mean",
    "ensemble_min": "Ensemble of dense seeds, minimum",
}


def write_report(results: Mapping[str, Any], output: Path, folder: Path) -> Path:
    """Write the report into `folder`, all of it or nothing, and return the path of its page.

    Args:
        output: of the study, which has the pictures.
    """
    results = _rounded(results)
    with staged(folder, kind=REPORT) as partial:
        (partial / RESULTS_FILE).write_text(json.dumps(results) + "\n", encoding="utf-8")
        pictures = {}
        for world in results["worlds"]:
            if (picture := output / curves_task(world) / CURVES_FOLDER / PICTURE_FILE).exists():
                pictures[world] = f"curves_{world}.png"
                shutil.copyfile(picture, partial / pictures[world])
        page = "\n".join(report_lines(results, pictures)) + "\n"
        (partial / REPORT_FILE).write_text(page, encoding="utf-8")
    return folder / REPORT_FILE


def report_lines(results: Mapping[str, Any], pictures: Mapping[str, str]) -> list[str]:
    """Return the lines of the page."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    seeds = results["settings"]["seeds"]
    lines = [
        f"# {results['title']}",
        "",
        "Gold is in its standard deviations within prompts; zero is what the policy gets by itself (n = 1). Accuracy: "
        "how often two responses to one prompt of the table are ordered as gold does. Brackets are 95 % intervals over"
        " prompts, by bootstrap, the same prompts for all models; those of differences have the spread of seeds in "
        "them too, as if seeds were not paired, except for ensembles. Where seeds are named, over "
        f"{len(seeds)} seeds, paired (t distribution). **Bold**: an interval of a difference excludes zero; none is "
        "corrected for how many there are.",
        "",
        f"{results['wall_seconds'] / 60:.0f} minutes in all, with whatever else the machine did, and over as many "
        f"starts as it took: between them the code may have changed. {versions}.",
        "",
        f"**{summary(results['worlds'])}**",
        "",
        *(f"- {note}" for note in results["settings"]["notes"]),
        "",
        *_gold_lines(results),
    ]
    for name, world in results["worlds"].items():
        lines += ["", *_world_lines(name, world, pictures.get(name))]
    return lines


def summary(worlds: Mapping[str, Any]) -> str:
    """Return in which worlds there is something to reduce."""
    losing = [world["title"] for world in worlds.values() if world["best_of_n"]["baseline_overoptimizes"]]
    if losing:
        return f"The dense model over-optimises in {len(losing)} of {len(worlds)} worlds: {', '.join(losing)}."
    return (
        "The dense model over-optimises in none of the worlds. There was nothing to reduce: what follows neither "
        "supports nor contradicts that merging reduces over-optimisation."
    )


def _gold_lines(results: Mapping[str, Any]) -> Iterator[str]:
    gold = results["gold"]
    sources = sorted(key.removesuffix("_pairs") for key in gold if key.endswith("_pairs"))
    yield "## Gold"
    yield ""
    yield f"Perplexity of the policy on held-out exchanges: {results['policy']['eval_perplexity']:.1f}."
    yield ""
    rows = [
        [
            "all" if source == "eval" else f"`{source.removeprefix('eval_').removeprefix('source/')}`",
            f"{gold[f'{source}_pairs']:,.0f}",
            f"{gold[f'{source}_accuracy']:.1%}",
            f"{gold[f'{source}_length_baseline']:.1%}",
        ]
        for source in sources
    ]
    yield from _table(["held-out pairs", "number", "accuracy of gold", "the longer answer"], rows)
    yield ""
    yield (
        "Gold tells people's answers from the policy's (`origins`: both answer one question). It stands for that, "
        'and for what people prefer only as far as it beats the longer answer on their pairs. "All" has both kinds.'
    )


def _world_lines(name: str, world: Mapping[str, Any], picture: str | None) -> Iterator[str]:
    measured = world["best_of_n"]
    yield f"## {world['title']} (`{name}`)"
    yield ""
    yield from _data_lines(world)
    yield ""
    last = measured["numbers"][-1]
    header = ["reward model", "accuracy", "peak", "at n", f"n = {last}", "drop", "regret"]
    yield from _table(header, (_curve_row(name, measured) for name in METHODS))
    yield ""
    yield "Less the dense model: paired by prompt, and by seed (which has the same first half of training):"
    yield ""
    at_end = f"gold at n = {last}"
    header = ["reward model", "drop", "drop, each seed", at_end, f"{at_end}, over seeds", f"{at_end}, each seed"]
    yield from _table(header, (_difference_row(name, measured) for name in METHODS if name != DENSE))
    yield ""
    yield from (f"- {verdict}" for verdict in measured["verdicts"])
    yield ""
    yield (
        "What the reward models follow, as correlations within prompts; and what learning coefficients did, held out "
        "of the pairs that merging learns from:"
    )
    yield ""
    yield from _feature_table(world["table"])
    yield ""
    yield from _fit_table(world["fits"])
    if picture:
        yield ""
        yield f"![Gold and proxy scores of the best of n, {world['title']}]({picture})"


def _data_lines(world: Mapping[str, Any]) -> Iterator[str]:
    labels, table, gold = world["labels"], world["table"], world["best_of_n"]["gold"]
    share_wrong = labels["wrong"] / labels["pairs"]
    line = f"{labels['pairs']:,} pairs to learn from; {share_wrong:.1%} of the labels are not gold's."
    if table["share_with_shortcut"] is not None:
        line += (
            f" The shortcut decides {labels['shortcut_decides']:,} of them, {labels['shortcut_against_gold']:,} "
            f"against gold; {table['share_with_shortcut']:.1%} of the responses in the table contain it."
        )
    merge = world["merge_labels"]
    line += (
        f" Merging learns from {merge['pairs']:,} others, on other prompts; {merge['wrong'] / merge['pairs']:.1%} of "
        "their labels are not gold's."
    )
    samples = world["best_of_n"]["samples"]
    yield (
        f"{line} The table: {samples['num_prompts']} prompts, {samples['num_responses']} responses each; gold's "
        f"standard deviation is {gold['standard_deviation_within_prompts']:.3f} within prompts, "
        f"{gold['standard_deviation']:.3f} over all."
    )


def _curve_row(name: str, measured: Mapping[str, Any]) -> list[str]:
    model = measured["models"][name]
    figures, gold = model["figures"], model["gold"]
    return [
        TITLES[name],
        f"{figures['pairwise_accuracy']:.1%}",
        f"{figures['gold_at_peak']:+.2f}",
        str(figures["peak"]),
        f"{figures['gold_at_end']:+.2f} [{gold['low'][-1]:+.2f}, {gold['high'][-1]:+.2f}]",
        f"{figures['drop']:.2f} [{model['drop_interval']['low']:.2f}, {model['drop_interval']['high']:.2f}]",
        f"{figures['regret']:.2f}",
    ]


def _difference_row(name: str, measured: Mapping[str, Any]) -> list[str]:
    comparison = measured["comparisons"][name]
    drops, golds = (seed_differences(measured, name, figure) for figure in ("drop", "gold_at_end"))
    over_seeds = _interval(mean_interval(golds)) if golds else ""
    return [
        TITLES[name],
        *(_difference(comparison["drop"]), _signed(drops)),
        *(_difference(comparison["gold_at_end"]), over_seeds, _signed(golds)),
    ]


def seed_differences(measured: Mapping[str, Any], name: str, figure: str) -> list[float]:
    """Return a figure of each seed of a model, less that of the dense model; nothing for an ensemble."""
    first, second = ([seed["figures"][figure] for seed in measured["models"][one]["seeds"]] for one in (name, DENSE))
    if len(first) != len(second):
        return []
    return [value - baseline for value, baseline in zip(first, second, strict=True)]


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in values)


def _difference(difference: Mapping[str, Any]) -> str:
    low, high = difference["interval"]["low"], difference["interval"]["high"]
    text = f"{difference['value']:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def _interval(interval: Interval) -> str:
    text = f"{interval.mean:+.2f} ± {interval.half_width:.2f}"
    return f"**{text}**" if interval.excludes_zero else text


def _feature_table(table: Mapping[str, Any]) -> Iterator[str]:
    features = list(table["correlation"])
    rows = [["Gold", *(f"{table['correlation'][feature]:+.2f}" for feature in features)]]
    rows += [
        [TITLES[name], *(f"{model[feature]:+.2f}" for feature in features)] for name, model in table["models"].items()
    ]
    yield from _table(["", *(f"with {feature}" for feature in features)], rows)


def _fit_table(fits: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        [
            str(seed),
            *(f"{fit['heldout'][when]['loss']:.4f}" for when in ("before", "after")),
            *(f"{fit['heldout'][when]['accuracy']:.1%}" for when in ("before", "after")),
            f"{fit['largest_move']:.3f}",
            f"{fit['largest_relative_move']:.0%}",
        ]
        for seed, fit in fits.items()
    ]
    header = ["seed", "held-out loss before", "after", "accuracy before", "after", "largest move", "relative"]
    yield from _table(header, rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _rounded(value: Any) -> Any:
    """Return `value` with numbers to six significant digits: more would only be noise between machines."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value
