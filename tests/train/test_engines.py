"""Every engine trains as one process does on the same global batch, saves what loads anywhere, and resumes exactly."""

import json
import shutil

import pytest
import torch
from process_groups import run_group
from safetensors.torch import load_file
from training_runs import ROOT, command_line
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from upcycled_moe.train.train import main


CONFIGS = sorted((ROOT / "train" / "configs" / "accelerate").glob("*.yaml"))
# What `accelerate launch` sets from the files there.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def _layout(**sizes):
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"} | {
        f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(size) for name, size in sizes.items()
    }


shards_at_load = pytest.mark.skipif(
    "ep_size" not in DistributedConfig.__dataclass_fields__, reason="this Transformers cannot shard experts at load"
)
ENGINES = [
    pytest.param(2, {}, FSDP, id="fsdp2"),
    pytest.param(4, {}, FSDP | _layout(dp_replicate=2, dp_shard=2), id="hybrid"),
    pytest.param(2, {"expert_parallel_size": 2}, {}, id="experts", marks=shards_at_load),
    pytest.param(2, {"tensor_parallel_size": 2}, {}, id="tensors", marks=[shards_at_load, pytest.mark.slow]),
    pytest.param(
        4,
        {"tensor_parallel_size": 2, "expert_parallel_size": 2},
        {},
        id="tensors_experts_shards",
        marks=shards_at_load,
    ),
    pytest.param(4, {"expert_parallel_size": 2}, {}, id="experts_shards", marks=[shards_at_load, pytest.mark.slow]),
]
ROUTER_FIGURES = ("lm_loss", "loss", "router/aux_loss", "router/z_loss", "router/entropy", "router/max_violation")


@pytest.fixture(scope="module")
def settings(make_moe_checkpoint, train_files):
    """Blocks one at a time: the load-balancing loss depends on which tokens are together in a micro-batch."""
    checkpoint = make_moe_checkpoint(use_router_bias=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(torch.tensor([0.02, -0.03, 0.01, 0.0]))
    model.save_pretrained(checkpoint)
    return {
        "model_name_or_path": checkpoint,
        "train_data": train_files,
        "eval_data": train_files,
        "max_eval_blocks": 3,
        "max_steps": 4,
        "block_size": 64,
        "tokens_per_step": 256,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        # Pictures take longer than the rest of the run.
        "router_probe_steps": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.fixture(scope="module")
def one_process(settings, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("one_process")
    assert main(command_line({**settings, "output_dir": output_dir})) == 0
    return output_dir


def _run(settings, output_dir, num_processes, environment):
    log = output_dir.with_suffix(".log")
    statuses = run_group({**settings, "output_dir": output_dir}, log, num_processes=num_processes, **environment)
    assert statuses == [0] * num_processes, log.read_text()


def _log(output_dir):
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def _assert_same_run(output_dir, reference):
    for entry, expected in zip(_log(output_dir), _log(reference), strict=True):
        assert entry["step"] == expected["step"]
        for key in expected:
            if key in ROUTER_FIGURES or key.startswith("router/layer_") or key.endswith(("_loss", "_perplexity")):
                assert entry[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (entry["step"], key)
    weights, expected = _weights(output_dir), _weights(reference)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def _weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.distributed
@pytest.mark.parametrize(("num_processes", "given", "environment"), ENGINES)
def test_an_engine_trains_as_one_process_and_resumes_bit_by_bit(
    settings, one_process, tmp_path, num_processes, given, environment
):
    output_dir, resumed = tmp_path / "out", tmp_path / "resumed"
    _run({**settings, **given}, output_dir, num_processes, environment)

    _assert_same_run(output_dir, one_process)
    for folder in (output_dir, output_dir / "checkpoint-2"):
        assert json.loads((folder / "config.json").read_text()) == json.loads(
            (one_process / "config.json").read_text()
        )

    resumed.mkdir()
    shutil.copytree(output_dir / "checkpoint-2", resumed / "checkpoint-2")
    _run({**settings, **given, "resume_from_checkpoint": "last"}, resumed, num_processes, environment)
    expected = _weights(output_dir)
    for name, tensor in _weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name
