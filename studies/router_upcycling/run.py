"""Compare ways to upcycle a dense model, each trained on the same tokens with several seeds.

    python studies/router_upcycling/run.py studies/router_upcycling/cpu_small.yaml --output runs/study

Writes `OUTPUT/report` with tables, pictures and `results.json`. Results that are there already, made with the same
settings, are kept: run the same command again to go on after an interruption. Exit status: 0 done, 1 failed at run
time, 2 wrong settings or input, 130 interrupted.
"""

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from checks import check_models_and_training
from plan import study_tasks
from study_report import write_report
from study_results import collect_results
from study_settings import StudySettings, load_study
from tasks import TaskError, locked, run_tasks, tasks_to_do

from upcycled_moe.common.settings import SettingsError


DATA = Path("../shared/data/pretrain")
REPORT_FOLDER = "report"


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file that describes the study")
    parser.add_argument("--output", type=Path, required=True, help="folder for results and report")
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        help=f"folder with DOMAIN_train.parquet and DOMAIN_validation.parquet (default: {DATA})",
    )
    parser.add_argument(
        "--num-workers", type=int, default=2, help="processes with a thread each; it changes no result (default: 2)"
    )
    options = parser.parse_args(argv)
    if options.num_workers < 1:
        parser.error(f"--num-workers {options.num_workers}: must be at least 1.")
    if options.num_workers > (os.cpu_count() or 1):
        print(
            f"run.py: warning: --num-workers {options.num_workers} on {os.cpu_count()} CPU cores; each run will take "
            "longer.",
            file=sys.stderr,
        )
    try:
        run_study(load_study(options.config), options.data, options.output, options.num_workers)
    except SettingsError as error:
        return _fail(2, str(error))
    except (TaskError, OSError) as error:
        return _fail(1, str(error))
    except BrokenProcessPool:
        return _fail(
            1, "a worker process was ended from outside, perhaps for want of memory; try fewer --num-workers."
        )
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
    if tasks_to_do(tasks, output):
        check_models_and_training(study)
    with locked(output):
        run_tasks(tasks, output, num_workers, keep_bulky=study.keep_checkpoints)
        report = write_report(study, collect_results(study, tasks, output), output / REPORT_FOLDER)
    print(f"Report: {report}")


def _set_environment(output: Path) -> None:
    """Set what the workers inherit: a thread each, no network, and a cache of tokens that goes with the study."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(output.resolve() / "cache")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def _fail(status: int, message: str) -> int:
    print(f"run.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
