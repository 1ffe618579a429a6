"""Whole runs of the script in one process: they learn, log what they promise, resume bit by bit, and save it all."""

import json
import math
import operator
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import ROOT, SHAPE, command_line
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM, Qwen3MoeConfig, Trainer

from modeling_upcycled_moe import UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM
from modeling_upcycled_moe.losses_upcycled_moe import router_losses
from upcycled_moe.common.numbers import perplexity
from upcycled_moe.common.pictures import can_draw
from upcycled_moe.common.routing_log import read_routing
from upcycled_moe.common.text import open_text, pack_blocks
from upcycled_moe.train.model import risks_of
from upcycled_moe.train.train import main


def _train(settings, model, output_dir, **more):
    assert main(command_line({**settings, "model_name_or_path": model, "output_dir": output_dir, **more})) == 0
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def _assert_equal(first, second):
    """Compare what checkpoints hold, tensor by tensor."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            _assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        for one, other in zip(first, second, strict=True):
            _assert_equal(one, other)
    elif not callable(first) and type(first).__module__ != "numpy":
        assert first == second


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, moe_checkpoint, text_folder):
    """A run of 30 steps with evaluation and TensorBoard, and its log."""
    pytest.importorskip("tensorboard")
    output_dir = tmp_path_factory.mktemp("short_run")
    settings = {
        "train_data": [str(text_folder)],
        "eval_data": [str(text_folder)],
        "max_eval_blocks": 3,
        "max_steps": 30,
        "block_size": 128,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "tensorboard",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return output_dir, _train(settings, moe_checkpoint, output_dir)


def test_training_lowers_the_loss(short_run):
    losses = [entry["lm_loss"] for entry in short_run[1] if "lm_loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_the_log_has_the_promised_figures(short_run):
    logs = [entry for entry in short_run[1] if "lm_loss" in entry]
    routing = list(read_routing(short_run[0] / "routing.jsonl"))
    assert [entry["step"] for entry in logs] == [5, 10, 15, 20, 25, 30]
    for entry, wide_entry in zip(logs, routing, strict=True):
        # The first layer is dense. The router losses weigh what the checkpoint says.
        assert not any(key.startswith("router/layer_00") for key in entry)
        loads = wide_entry["layers"]["1"]["load"]
        assert wide_entry["step"] == entry["step"]
        assert sum(loads) == pytest.approx(1, abs=1e-5)
        assert entry["router/layer_01/max_violation"] == pytest.approx(4 * max(loads) - 1, abs=1e-5)
        assert entry["router/layer_01/dead_experts"] == loads.count(0)
        assert 0 < entry["router/layer_01/entropy"] <= math.log(4) + 1e-6
        assert entry["router/entropy"] == entry["router/layer_01/entropy"]
        router_loss = 0.05 * entry["router/aux_loss"] + 0.01 * entry["router/z_loss"]
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + router_loss)
        assert entry["tokens_per_second"] > 0


def test_tensorboard_has_the_same_figures(short_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output_dir, logs = short_run
    (run,) = (output_dir / "runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    for key in ("train/lm_loss", "train/router/layer_01/entropy", "train/router/max_violation"):
        logged = [entry[key.removeprefix("train/")] for entry in logs if "lm_loss" in entry]
        assert [event.value for event in events.Scalars(key)] == pytest.approx(logged)
    assert "eval/fiction_perplexity" in events.Tags()["scalars"]
    if can_draw():
        assert {"train/router_loads", "train/router_saturation"} <= set(events.Tags()["images"])


def test_evaluation_is_the_pure_loss_over_all_tokens_of_each_domain(short_run, text_folder):
    from transformers import AutoTokenizer

    from upcycled_moe.common.blocks import collate_blocks
    from upcycled_moe.common.packing import PackedBlocks, TokenizedText
    from upcycled_moe.common.text import open_text

    output_dir, logs = short_run
    metrics = {key: value for entry in logs for key, value in entry.items() if key.startswith("eval_")}
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)

    losses, num_targets = [], []
    for domain in ("detective", "fiction", "travel"):
        documents = TokenizedText(open_text([str(text_folder / f"{domain}_validation.*")]), tokenizer)
        blocks = PackedBlocks(documents, 128, document_mask=True)
        batch = collate_blocks([block for _, block in zip(range(3), blocks, strict=False)])
        with torch.no_grad():
            losses.append(model(**batch, use_cache=False).loss.item())
        num_targets.append((batch["labels"] >= 0).sum().item())
        assert metrics[f"eval_{domain}_loss"] == pytest.approx(losses[-1], abs=1e-5)
        assert metrics[f"eval_{domain}_perplexity"] == pytest.approx(math.exp(losses[-1]), rel=1e-4)
    mean = sum(map(operator.mul, losses, num_targets)) / sum(num_targets)
    assert metrics["eval_loss"] == pytest.approx(mean, abs=1e-5)


def test_the_perplexity_of_a_huge_loss_is_infinite():
    assert perplexity(1.0) == math.e
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_the_saved_model_loads_as_remote_code_where_the_package_is_not_importable(warm_python, short_run):
    script = (
        "import sys; sys.modules['modeling_upcycled_moe'] = None\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert len(config.auto_map) == 4, config.auto_map\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert model.model.layers[1].mlp.experts.gate_up_proj.shape == (4, 96, 32)\n"
    )
    result = warm_python.run(script, short_run[0])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("position_is_saved", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(settings, moe_checkpoint, tmp_path, position_is_saved):
    # Noise on the router's input makes the state of the random generators count.
    settings |= {"save_strategy": "steps", "save_steps": 3, "router_jitter_noise": 0.1, "tokens_per_step": 256}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    _train(settings, moe_checkpoint, whole)
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    if not position_is_saved:
        (resumed / "checkpoint-3" / "data_position.json").unlink()
    _train(settings, moe_checkpoint, resumed, resume_from_checkpoint="last")

    start, one, other = (load_file(folder / "model.safetensors") for folder in (moe_checkpoint, whole, resumed))
    _assert_equal(one, other)
    assert not torch.equal(start["model.layers.1.mlp.experts.down_proj"], one["model.layers.1.mlp.experts.down_proj"])
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(folder / "checkpoint-6" / name, weights_only=False) for folder in (whole, resumed)]
        _assert_equal(*states)
    positions = [(folder / "checkpoint-6" / "data_position.json").read_text() for folder in (whole, resumed)]
    assert positions[0] == positions[1]


def test_resuming_with_another_global_batch_is_refused(settings, moe_checkpoint, tmp_path, capsys):
    settings |= {"model_name_or_path": moe_checkpoint, "output_dir": tmp_path, "max_steps": 2}
    assert main(command_line({**settings, "save_strategy": "steps", "save_steps": 1})) == 0

    smaller = {**settings, "max_steps": 3, "per_device_train_batch_size": 1, "resume_from_checkpoint": "last"}
    assert main(command_line(smaller)) == 2
    assert "was saved with blocks_per_step=2, this run has 1" in capsys.readouterr().err
    assert main(command_line(settings)) == 2
    assert "holds checkpoint-2 of an earlier run" in capsys.readouterr().err


def test_a_dense_checkpoint_trains_without_router_figures(settings, dense_checkpoint, tmp_path):
    logs = _train(settings, dense_checkpoint, tmp_path)

    assert not any(key.startswith("router/") for entry in logs for key in entry)
    assert logs[0]["lm_loss"] == logs[0]["loss"]
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), Qwen2ForCausalLM)


def test_the_end_of_text_token_is_learned_where_it_pads_too(settings, make_moe_checkpoint, tmp_path):
    start = make_moe_checkpoint(pad_token_id=0)
    assert AutoModelForCausalLM.from_pretrained(start).model.embed_tokens.padding_idx == 0
    text = tmp_path / "short.jsonl"
    text.write_text("".join(json.dumps({"text": "A few words."}) + "\n" for _ in range(8)))
    _train({**settings, "train_data": text, "max_steps": 2}, start, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "out"))
    name = "model.embed_tokens.weight"
    assert not torch.equal(before[name][0], after[name][0])


def test_each_layer_logs_its_own_router_losses(settings, tokenizer, train_files, tmp_path):
    torch.manual_seed(0)
    fields = {"router_entropy_loss_coef": 0.02, "router_locality_loss_coef": 0.03, "expert_nodes": [0] * 4}
    config = UpcycledQwenMoeConfig(**SHAPE, num_experts=4, **fields)
    model = UpcycledQwenMoeForCausalLM(config)
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    first = _train(settings, tmp_path / "start", tmp_path / "out", max_steps=1, logging_steps=1)[0]

    blocks = pack_blocks(open_text(train_files), tokenizer, 64)
    input_ids = torch.tensor([block["input_ids"] for block, _ in zip(blocks, range(2), strict=False)])
    outputs = model(input_ids=input_ids, output_router_logits=True)
    losses = router_losses(config, outputs.router_logits, outputs.selected_experts)
    assert len(losses) == 4
    for name, expected in losses.items():
        logged = [first[f"router/layer_{layer:02d}/{name}"] for layer in range(2)]
        assert logged == pytest.approx(expected.tolist(), rel=1e-5)
        assert first[f"router/{name}"] == pytest.approx(sum(logged) / 2)
    weighted = {"aux_loss": 0.001, "entropy_loss": 0.02, "locality_loss": 0.03}
    router_loss = sum(weight * first[f"router/{name}"] for name, weight in weighted.items())
    assert first["loss"] == pytest.approx(first["lm_loss"] + router_loss)


def test_biases_move_by_the_loads_of_whole_steps(settings, moe_checkpoint, train_files, tmp_path):
    """Two micro-batches a step; between steps the model is evaluated, and logs come after each step or after all."""
    settings |= {"gradient_accumulation_steps": 2, "router_bias_update_rate": 1e-4, "max_steps": 5}
    settings |= {"eval_data": train_files, "eval_steps": 1, "max_eval_blocks": 2}

    _train(settings, moe_checkpoint, tmp_path / "often", logging_steps=1)
    _train(settings, moe_checkpoint, tmp_path / "seldom", logging_steps=5)

    expected = torch.zeros(4)
    routing = list(read_routing(tmp_path / "often" / "routing.jsonl"))
    assert len(routing) == 5
    for entry in routing:
        loads = torch.tensor(entry["layers"]["1"]["load"])
        expected += 1e-4 * torch.sign((0.25 - loads).round(decimals=6))
    assert expected.unique().numel() > 1
    for folder in ("often", "seldom"):
        weights = load_file(tmp_path / folder / "model.safetensors")
        torch.testing.assert_close(weights["model.layers.1.mlp.gate.selector.e_score_correction_bias"], expected)


def test_tokens_per_second_leaves_out_evaluation_and_saving(
    settings, moe_checkpoint, train_files, tmp_path, monkeypatch
):
    waited_s = 0
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + waited_s)
    monkeypatch.setattr("upcycled_moe.train.monitoring.mixin.time", clock)
    for name in ("evaluate", "_save_checkpoint"):
        original = getattr(Trainer, name)

        def slow(*args, original=original, **kwargs):
            nonlocal waited_s
            waited_s += 3600
            return original(*args, **kwargs)

        monkeypatch.setattr(Trainer, name, slow)
    settings |= {"eval_data": train_files[:1], "max_eval_blocks": 1, "eval_steps": 1, "logging_steps": 1}
    logs = _train(settings, moe_checkpoint, tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    # 128 tokens a step, and an hour for each evaluation and checkpoint.
    assert waited_s == 6 * 3600
    assert min(entry["tokens_per_second"] for entry in logs[1:] if "lm_loss" in entry) > 1


def test_origin_and_licence_of_the_start_go_with_the_final_model(settings, moe_checkpoint, tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(moe_checkpoint, start)
    for name in ("LICENSE", "NOTICE.txt"):
        (start / name).write_text(name)
    origin = {"source": {"name": "org/dense", "revision": "0123abc"}}
    (start / "upcycling.json").write_text(json.dumps(origin))
    _train(settings, start, out, max_steps=2, save_strategy="steps", save_steps=1)

    for folder, num_steps in ((out, 2), (out / "checkpoint-1", 1)):
        for name in ("LICENSE", "NOTICE.txt"):
            assert (folder / name).read_text() == name
        provenance = json.loads((folder / "upcycling.json").read_text())
        (trained,) = provenance.pop("steps")
        assert provenance == origin
        assert (trained["steps"], trained["tokens"]) == (num_steps, num_steps * 128)
        card = (folder / "README.md").read_text()
        assert "[org/dense](https://huggingface.co/org/dense)" in card
        assert f"**train** for {num_steps} step" in card


def test_blocks_longer_than_the_positions_are_refused(settings, moe_checkpoint, tmp_path, capsys):
    settings |= {"model_name_or_path": moe_checkpoint, "output_dir": tmp_path, "block_size": 257}

    assert main(command_line(settings)) == 2
    assert "block_size=257 exceeds max_position_embeddings=256" in capsys.readouterr().err


def test_weights_that_never_change_are_warned_of():
    for fields in (
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 2, "router_selection": "prototype_top_k", "num_expert_groups": 2},
    ):
        [risk] = risks_of(UpcycledQwenMoeConfig(**SHAPE, num_experts=4, **fields))
        assert "gives the router no gradient" in risk
    for fields in ({"num_experts_per_tok": 2}, {"num_experts_per_tok": 1, "norm_topk_prob": False}):
        assert risks_of(UpcycledQwenMoeConfig(**SHAPE, num_experts=4, **fields)) == []
    assert risks_of(Qwen3MoeConfig(num_experts_per_tok=1, norm_topk_prob=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"router_entropy_loss_coef": -1}, "router_entropy_loss_coef=-1.0 is outside [0, inf)"),
        ({"router_locality_loss_coef": 0.1}, "router_locality_loss_coef needs expert_nodes"),
        ({"router_locality_loss_coef": 0.1, "expert_nodes": [0, 0, 1, 1]}, "must name the nodes of this run, 0 to 0"),
        ({"expert_nodes": [0, 1]}, "must name a node, from 0, for each of the 4 experts"),
        ({"router_bias_update_rate": 0.5}, "has no meaning with use_router_bias=False"),
    ],
    ids=str,
)
def test_router_settings_that_do_not_fit_the_model_are_refused_before_training(
    settings, make_moe_checkpoint, tmp_path, capsys, setting, message
):
    settings |= {"model_name_or_path": make_moe_checkpoint(), "output_dir": tmp_path / "out", **setting}

    assert main(command_line({**settings})) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("is_evaluated", [False, True])
def test_the_shipped_config_trains_with_and_without_evaluation(moe_checkpoint, train_files, tmp_path, is_evaluated):
    """The command of the README, with a tiny model and short blocks on a CPU."""
    config = ROOT / "train" / "configs" / "router_upcycling.yaml"
    settings = {
        **{"model_name_or_path": moe_checkpoint, "output_dir": tmp_path, "train_data": train_files[:1]},
        **{"bf16": True, "max_steps": 2, "use_cpu": True, "block_size": 64, "tokens_per_step": 256, "eval_steps": 1},
        **({"eval_data": train_files, "max_eval_blocks": 2} if is_evaluated else {}),
    }
    assert main(["--config", str(config), *command_line(settings)]) == 0

    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == ([1, 2] if is_evaluated else [])
    assert yaml.safe_load((tmp_path / "training_config.yaml").read_text())["eval_strategy"] == (
        "steps" if is_evaluated else "no"
    )


def test_router_settings_need_a_model_with_routers(settings, dense_checkpoint, tmp_path, capsys):
    settings |= {"model_name_or_path": dense_checkpoint, "output_dir": tmp_path, "router_z_loss_coef": 0.1}

    assert main(command_line(settings)) == 2
    assert "is a qwen2 model without it; leave it out." in capsys.readouterr().err
