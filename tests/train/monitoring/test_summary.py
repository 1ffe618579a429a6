"""The line at the end of a run."""

from types import SimpleNamespace

from transformers.trainer_utils import TrainOutput

from upcycled_moe.train.monitoring.summary import summary


def _trainer(**fields):
    defaults = {
        "args": SimpleNamespace(output_dir="OUT"),
        "num_trained_tokens": 0.0,
        "training_seconds": 0.0,
        "num_skipped_steps": 0,
        "last_layers": {},
        "speed": lambda num_tokens, seconds: {"tokens_per_second": num_tokens / seconds},
    }
    return SimpleNamespace(**{**defaults, **fields})


def test_what_is_there_is_told():
    layers = {
        1: {"max_violation": 0.5, "dead_experts": 0, "load": [0.25] * 4},
        3: {"max_violation": 1.0, "dead_experts": 1, "load": [0.25] * 4},
    }
    trainer = _trainer(
        num_trained_tokens=6e6,
        training_seconds=3000.0,
        num_skipped_steps=2,
        last_layers=layers,
        speed=lambda num_tokens, seconds: {"tokens_per_second": num_tokens / seconds, "mfu": 0.412},
    )
    assert summary(trainer, TrainOutput(1200, 2.5, {}), {"eval_perplexity": 20.5}) == (
        "OUT: 1,200 steps, 6,000,000 tokens in 50 min 0 s (2,000 tokens/s, MFU 41.2%), loss 2.5000, "
        "eval perplexity 20.500, 2 steps skipped, 1 of 8 experts without a token at the last log, "
        "largest load 2 × the balanced one in layer 3"
    )


def test_what_is_not_there_is_left_out():
    trainer = _trainer(num_trained_tokens=100.0, training_seconds=5.0)
    expected = "OUT: 7 steps, 100 tokens in 5.0 s (20 tokens/s), loss 2.0000"
    assert summary(trainer, TrainOutput(7, 2.0, {}), {}) == expected
    assert summary(_trainer(), TrainOutput(7, 2.0, {}), {}) == "OUT: 7 steps"
