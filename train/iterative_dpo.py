"""Train a policy, MoE or dense, by rounds of DPO, each held to a merge of the policies before it.

One process:

    python train/iterative_dpo.py --config train/configs/iterative_dpo.yaml model_name_or_path=CHECKPOINT \
        output_dir=OUT train_data=PAIRS_train.parquet eval_data=PAIRS_test.parquet reference=learned

Several, with a whole model each:

    torchrun --nproc_per_node 8 train/iterative_dpo.py --config train/configs/iterative_dpo.yaml ...

Continue a run that was stopped: the same command.

Writes a folder for each round, with its policy as a checkpoint, and figures of all rounds to OUT. Exit status: 0 done,
1 failed at run time, 2 wrong settings or input, 130 interrupted; 143 after SIGTERM and 138 after SIGUSR1 in training,
with a checkpoint.
"""

import json
import os
import sys

from upcycled_moe.train.messages import Stderr
from upcycled_moe.train.preference.dpo_arguments import IterativeDPOArguments, format_help, parse_arguments
from upcycled_moe.train.script import exit_status


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    if "--help" in argv or "-h" in argv:
        print(format_help())
        return 0
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return exit_status("iterative_dpo.py", lambda: train(parse_arguments(argv)), lambda: "the same command goes on.")


def train(arguments: IterativeDPOArguments) -> None:
    """Do what is left of the rounds that `arguments` ask for, and print the figures of all.

    Raises:
        SettingsError: for settings or input that the user has to change.
    """
    from transformers.utils import logging

    from upcycled_moe.common.files import replacing, write_text
    from upcycled_moe.common.pictures import can_draw
    from upcycled_moe.train.preference.round_figures import figures_table
    from upcycled_moe.train.preference.round_plot import plot_rounds
    from upcycled_moe.train.preference.rounds import Rounds

    # Models are loaded and written many times over.
    logging.disable_progress_bar()
    rounds = Rounds(arguments, Stderr())
    figures = rounds.run()
    if not rounds.state.is_main_process:
        return
    with replacing(rounds.folder / "rounds.jsonl") as partial:
        write_text(partial, "".join(json.dumps(row, allow_nan=False) + "\n" for row in figures))
    if can_draw():
        plot_rounds({arguments.rounds.reference: figures}, rounds.folder / "rounds.png")
    print(figures_table(figures))
    print(f"Policy of the last round: {rounds.policy_folder(arguments.rounds.num_rounds)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
