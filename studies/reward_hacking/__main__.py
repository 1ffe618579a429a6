"""Does upcycling a reward model and merging it again reduce reward hacking?

    python -m studies.reward_hacking studies/reward_hacking/cpu_small.yaml --output runs/reward_hacking

Writes `OUTPUT/report` with tables, pictures and `results.json`. Results that are there already, made with the same
settings, are kept: run the same command again to go on after an interruption. Exit status: 0 done, 1 failed at run
time, 2 wrong settings or input, 130 interrupted.
"""

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from upcycled_moe.common.settings import SettingsError

from ..router_upcycling.tasks import TaskError, locked, run_tasks
from .plan import study_tasks
from .report import write_report
from .results import collect_results
from .settings import StudySettings, load_study


PROGRAM = "studies.reward_hacking"
DATA = Path("../shared/data/preference")
REPORT_FOLDER = "report"


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file that describes the study")
    parser.add_argument("--output", type=Path, required=True, help="folder for results and report")
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        help=f"folder with SOURCE_train.parquet and SOURCE_test.parquet (default: {DATA})",
    )
    parser.add_argument(
        "--num-workers", type=int, default=1, help="processes with a thread each; it changes no result (default: 1)"
    )
    options = parser.parse_args(argv)
    if options.num_workers < 1:
        parser.error(f"--num-workers {options.num_workers}: must be at least 1.")
    try:
        run_study(load_study(options.config), options.data, options.output, options.num_workers)
    except SettingsError as error:
        return _fail(2, str(error))
    except (TaskError, OSError) as error:
        return _fail(1, str(error))
    except BrokenProcessPool:
        return _fail(1, "a worker process was ended from outside, perhaps for want of memory.")
    except KeyboardInterrupt:
        return _fail(130, "interrupted; run the same command again to go on.")
    return 0


def run_study(study: StudySettings, data: Path, output: Path, num_workers: int) -> None:
    """Run what is missing of `study` in `output`, and write its report.

    Raises:
        SettingsError: for settings or input that the user has to change.
        TaskError: if a part of it fails.
    """
    tasks = study_tasks(study, data)
    _set_environment(output)
    with locked(output):
        run_tasks(tasks, output, num_workers, keep_bulky=True)
        report = write_report(collect_results(study, tasks, output), output, output / REPORT_FOLDER)
    print(f"Report: {report}")


def _set_environment(output: Path) -> None:
    """Set what the workers inherit: a thread each, no network, and a cache that goes with the study."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(output.resolve() / "cache")


def _fail(status: int, message: str) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
