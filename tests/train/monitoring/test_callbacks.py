"""What stands on the screen while a run goes on."""

from types import SimpleNamespace

from upcycled_moe.train.monitoring.callbacks import ShortProgressCallback


def test_a_log_is_a_short_line_and_the_bar_has_loss_and_speed():
    lines, shown = [], {}
    callback = ShortProgressCallback()
    callback.training_bar = SimpleNamespace(
        write=lines.append, set_postfix=lambda values, refresh: shown.update(values)
    )
    logs = {
        "loss": 3.14159,
        "tokens_per_second": 12345.6,
        "router/entropy": 1.5,
        "router/layer_01/entropy": 1.5,
        "grad_norm/routers": 0.1,
    }
    state = SimpleNamespace(is_world_process_zero=True)
    callback.on_log(None, state, None, logs=logs)
    callback.on_log(None, state, None, logs={"eval_loss": 3.0})

    assert lines == [
        "{'loss': '3.142', 'tokens_per_second': '1.235e+04', 'router/entropy': '1.5'}",
        "{'eval_loss': '3'}",
    ]
    assert shown == {"loss": "3.142", "tokens/s": "12,346"}
    assert len(logs) == 5, "what others log is no longer whole"
