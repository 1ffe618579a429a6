"""Train a reward model, MoE or dense, on preference pairs, by the Bradley-Terry loss and the losses of its routers.

One process:

    python train/reward.py --config train/configs/reward.yaml model_name_or_path=CHECKPOINT output_dir=OUT \
        train_data=PAIRS_train.parquet eval_data=PAIRS_test.parquet

Several, with a whole model each:

    accelerate launch train/reward.py --config train/configs/reward.yaml ...
    torchrun --nproc_per_node 8 train/reward.py --config train/configs/reward.yaml ...

Continue a run that was stopped: the same command with resume_from_checkpoint=last.

Writes checkpoints, the final model with its tokenizer, the resolved settings and the evaluation to OUT. Exit status:
0 done, 1 failed at run time, 2 wrong settings or input, 130 interrupted; 143 after SIGTERM and 138 after SIGUSR1, with
a checkpoint.
"""

import os
import sys

from upcycled_moe.common.progress import Progress
from upcycled_moe.train.messages import Stderr
from upcycled_moe.train.preference.reward_arguments import RewardArguments, format_help, parse_arguments
from upcycled_moe.train.script import exit_status


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    if "--help" in argv or "-h" in argv:
        print(format_help())
        return 0
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    output_dir = None

    def run() -> None:
        nonlocal output_dir
        arguments = parse_arguments(argv)
        output_dir = arguments.training.output_dir
        train(arguments)

    return exit_status("reward.py", run, lambda: _way_on(output_dir))


def _way_on(output_dir: str | None) -> str:
    """Return how a run that was interrupted is gone on with."""
    if output_dir is not None:
        from upcycled_moe.train.saving.checkpoints import checkpoint_folders, fault_of

        if any(fault_of(folder) is None for folder in checkpoint_folders(output_dir)):
            return "continue from the newest checkpoint with resume_from_checkpoint=last."
    return "there is no checkpoint yet: start again with the same command."


def train(arguments: RewardArguments) -> None:
    """Train as `arguments` say, evaluate, and save the model.

    Raises:
        SettingsError: for settings or input that the user has to change.
    """
    from transformers import set_seed

    from upcycled_moe.train.model import carry_files, risks_of
    from upcycled_moe.train.monitoring.callbacks import shorten_console_log
    from upcycled_moe.train.preference.reward_model import load_reward_start
    from upcycled_moe.train.preference.reward_output import check_output_dir
    from upcycled_moe.train.preference.reward_pairs import read_pair_rows
    from upcycled_moe.train.preference.reward_report import (
        evaluation_table,
        reward_card_callback,
        write_reward_config,
        write_reward_evaluation,
    )
    from upcycled_moe.train.preference.reward_trainer import RewardModelTrainer
    from upcycled_moe.train.saving.checkpoints import checkpoint_to_resume

    model_args, data_args, args, _ = arguments
    check_output_dir(args)
    set_seed(args.seed)
    model, tokenizer = load_reward_start(model_args, args.max_length, args.seed)
    progress = Stderr() if args.should_log else Progress()
    train_pairs, eval_rows = read_pair_rows(data_args, tokenizer, args.max_length, args.seed, progress)
    args.set_num_steps(len(train_pairs.rows))
    checkpoint = checkpoint_to_resume(args)
    trainer = RewardModelTrainer(
        model=model, args=args, train_dataset=train_pairs.rows, eval_dataset=eval_rows, processing_class=tokenizer
    )
    shorten_console_log(trainer)
    if args.should_save:
        write_reward_config(arguments, trainer)
        start = carry_files(model_args, args.output_dir)
        trainer.add_callback(reward_card_callback(arguments, start, train_pairs))
        for risk in risks_of(trainer.model.config):
            progress.warn(risk)

    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate_at_end() if eval_rows is not None else {}
    trainer.save_model()
    if args.should_save:
        if metrics:
            write_reward_evaluation(metrics, args.output_dir)
            print(evaluation_table(metrics))
        print(f"Reward model: {args.output_dir}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
