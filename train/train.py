"""Train a MoE checkpoint, or a dense one, on streamed text.

One process:

    python train/train.py --config train/configs/small.yaml model_name_or_path=CHECKPOINT output_dir=OUT \
        train_data=TEXT.parquet

Several, on the GPUs of a node, whole models or sharded (FSDP2):

    accelerate launch --config_file train/configs/accelerate/ddp.yaml train/train.py \
        --config train/configs/router_upcycling.yaml model_name_or_path=CHECKPOINT output_dir=OUT train_data=TEXT
    accelerate launch --config_file train/configs/accelerate/fsdp2.yaml train/train.py \
        --config train/configs/router_upcycling.yaml model_name_or_path=CHECKPOINT output_dir=OUT train_data=TEXT
    torchrun --nproc_per_node 8 train/train.py --config train/configs/router_upcycling.yaml ...

Continue a run that was stopped: the same command with resume_from_checkpoint=last.

Writes checkpoints, the final model with its tokenizer, and the resolved settings to OUT. Exit status: 0 done, 1 failed
at run time, 2 wrong settings or input, 130 interrupted; 143 after SIGTERM and 138 after SIGUSR1, with a checkpoint.
"""

import atexit
import os
import sys

from upcycled_moe.train.arguments import Arguments, format_help, parse_arguments
from upcycled_moe.train.errors import RunEnded
from upcycled_moe.train.script import exit_status


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    if "--help" in argv or "-h" in argv:
        print(format_help())
        return 0
    return exit_status(
        "train.py",
        lambda: train(parse_arguments(argv)),
        lambda: "continue from the newest checkpoint with resume_from_checkpoint=last.",
    )


def train(arguments: Arguments) -> None:
    """Train as `arguments` say, evaluate, and save the model.

    Raises:
        SettingsError: for settings or input that the user has to change.
    """
    from transformers import set_seed

    from upcycled_moe.hub.destination import check_destination
    from upcycled_moe.train.data.blocks import (
        ResumableBlocks,
        SavePositionCallback,
        choose_collator,
        evaluation_sets,
        resume_position,
    )
    from upcycled_moe.train.data.sources import training_blocks
    from upcycled_moe.train.engines import distributed_config, lay_out_processes, weights_at_load
    from upcycled_moe.train.model import carry_files, load_model, load_tokenizer, risks_of
    from upcycled_moe.train.monitoring.callbacks import shorten_console_log
    from upcycled_moe.train.monitoring.summary import summary
    from upcycled_moe.train.saving.card import card_callback
    from upcycled_moe.train.saving.checkpoints import checkpoint_to_resume
    from upcycled_moe.train.saving.pushing import destination_of, push_final_model
    from upcycled_moe.train.saving.run_config import write_config
    from upcycled_moe.train.trainer import UpcyclingTrainer

    model_args, data_args, training_args, *_ = arguments
    lay_out_processes(training_args, data_args)
    training_args.set_tokens_per_step(data_args.block_size)
    if training_args.push_to_hub and training_args.process_index == 0:
        check_destination(destination_of(training_args))
    try:
        checkpoint = checkpoint_to_resume(training_args)
    except RunEnded:
        # The model is final, and perhaps not there yet: its upload may have failed.
        push_final_model(training_args)
        raise
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    order_seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    packed = training_blocks(data_args, tokenizer, order_seed)
    blocks = ResumableBlocks(packed)
    if checkpoint is not None:
        resume_position(checkpoint, blocks, training_args)
    eval_sets = evaluation_sets(data_args, training_args, tokenizer) if data_args.eval_data else None

    model = load_model(
        model_args,
        tokenizer,
        data_args.block_size,
        distributed_config(training_args),
        weights_at_load(training_args, checkpoint),
    )
    trainer = UpcyclingTrainer(
        model=model,
        args=training_args,
        train_dataset=blocks,
        eval_dataset=eval_sets,
        data_collator=choose_collator(model.config._attn_implementation, training_args, data_args.document_mask),
        processing_class=tokenizer,
        callbacks=[SavePositionCallback(packed)],
    )
    shorten_console_log(trainer)
    if training_args.should_save:
        _announce(arguments, checkpoint)
        write_config(arguments, trainer)
        start = carry_files(model_args, training_args.output_dir)
        trainer.add_callback(card_callback(arguments, start))
        for risk in risks_of(trainer.model.config):
            print(f"train.py: warning: {risk}", file=sys.stderr)

    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate_at_end() if eval_sets else {}
    trainer.save_model()
    if training_args.should_save:
        print(summary(trainer, result, metrics))
    trainer.accelerator.end_training()
    push_final_model(training_args)


def _announce(arguments: Arguments, checkpoint: str | None) -> None:
    """Say what begins: the number of processes is easily another than was meant."""
    from upcycled_moe.train.data.blocks import blocks_per_step

    _, data_args, training_args, *_ = arguments
    for note in arguments.notes:
        print(f"train.py: {note}", file=sys.stderr)
    num_tokens = blocks_per_step(training_args) * data_args.block_size
    start = checkpoint or arguments.model.model_name_or_path
    print(
        f"{training_args.world_size} processes, {num_tokens:,} tokens a step, {training_args.max_steps:,} steps, "
        f"from {start}",
        file=sys.stderr,
    )


def _exit(status: int) -> None:
    """End the process now that all is written, without waiting for threads.

    The interpreter's own shutdown can wait forever for a thread of a reader of the text (apache/arrow#45214), which
    would hold all machines of a run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _exit(main(sys.argv[1:]))
