"""`upcycled-moe card`: the model card of a checkpoint."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..model_cards.extras import CardExtras

MEMORY_ADVICE = "free some memory"


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "card",
        usage="%(prog)s CKPT [options]",
        help="write the model card of a checkpoint",
        description="Write the model card of CKPT, README.md, from what lies in its folder: configuration, weights, "
        "provenance, the files of a training. Scores and figures on the routing come from reports. A card that was "
        "written or edited by hand is not replaced without --overwrite. Name, licence, languages and datasets that "
        "were given once hold in later cards too.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="folder of a checkpoint")
    parser.add_argument(
        "--evaluation",
        action="append",
        metavar="FILE",
        help="results.json of `upcycled-moe evaluate`; may be given several times (default: the one in CKPT, if any)",
    )
    parser.add_argument(
        "--analysis",
        metavar="FILE",
        help="report.json of `upcycled-moe analyze`; pictures beside it are copied into figures/ beside the card "
        "(default: the one in CKPT, if any)",
    )
    parser.add_argument("--model-name", metavar="NAME", help="title (default: after the dense model)")
    parser.add_argument(
        "--license", metavar="ID", help="licence, as the Hub calls it (default: that of the dense model, if known)"
    )
    parser.add_argument("--license-name", metavar="NAME", help="name of a licence that is `other`")
    parser.add_argument("--license-link", metavar="URL", help="its text")
    parser.add_argument(
        "--language", nargs="+", metavar="CODE", help="languages (default: those of the dense model, if known)"
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        metavar="ID",
        help="datasets on the Hub that it was made with (default: those of its conversion and training)",
    )
    parser.add_argument("--output", metavar="FILE", help="write the card there (default: README.md in CKPT)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew: replace a card that was written or edited by hand, pictures in its way, and what was "
        "declared with flags before",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the card and write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON: file, metadata and pictures")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from ..common.settings import SettingsError
    from ..model_cards.card import CARD_FILE, declared_in
    from ..model_cards.finished import finish_card

    folder = Path(options.checkpoint)
    if not folder.is_dir():
        raise SettingsError(f"{options.checkpoint}: no such folder; give a checkpoint that is here.")
    for name in ("license_name", "license_link"):
        if getattr(options, name) and not options.license:
            raise SettingsError(f"--{name.replace('_', '-')} has no meaning without --license; give both or none.")
    _check_names(options)
    path = Path(options.output) if options.output else folder / CARD_FILE
    if not path.parent.is_dir():
        raise SettingsError(f"{path}: there is no folder {path.parent}; make it first.")
    extras = _extras(options, folder)
    if not options.overwrite:
        extras = extras.with_earlier(declared_in(folder / CARD_FILE))
    card = finish_card(folder, extras, path)
    card.check(overwrite=options.overwrite)
    if not options.dry_run:
        card.write(overwrite=options.overwrite)
    if options.json:
        print(json.dumps(card.to_dict() | {"written": not options.dry_run}, indent=2))
    elif options.dry_run:
        print(card.text, end="")
    else:
        pictures = f", {len(card.pictures)} pictures" if card.pictures else ""
        print(f"Wrote {path}{pictures}.")
    return 0


def _check_names(options: argparse.Namespace) -> None:
    """Check what stands in a line of the card, and that no report counts twice."""
    from ..common.settings import SettingsError

    for name in ("model_name", "license_name", "license_link"):
        value = getattr(options, name)
        if value is not None and (not value.strip() or len(value.splitlines()) > 1):
            raise SettingsError(f"--{name.replace('_', '-')} {value!r}: must be one line of text.")
    files = [Path(file).resolve() for file in options.evaluation or ()]
    if len(set(files)) < len(files):
        raise SettingsError("--evaluation names a file twice, which would double its results; give each once.")


def _extras(options: argparse.Namespace, folder: Path) -> "CardExtras":
    """Return what the options ask for, with the reports that lie in `folder` unless others are named."""
    from ..model_cards.analysis import ANALYSIS_FILE, read_analysis
    from ..model_cards.evaluation import EVALUATION_FILE, read_evaluation
    from ..model_cards.extras import CardExtras

    evaluations = options.evaluation or _if_there(folder / EVALUATION_FILE)
    analyses = [options.analysis] if options.analysis else _if_there(folder / ANALYSIS_FILE)
    return CardExtras(
        title=options.model_name,
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        language=options.language or (),
        datasets=options.datasets or (),
        evaluations=[read_evaluation(Path(file), folder) for file in evaluations],
        analysis=read_analysis(Path(analyses[0]), folder) if analyses else None,
    )


def _if_there(path: Path) -> list[Path]:
    return [path] if path.is_file() else []
