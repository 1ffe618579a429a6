"""Every engine trains as one process does on the same global batch, saves what loads anywhere, and resumes exactly."""

import json
import math
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from process_groups import run_group
from safetensors.torch import load_file
from training_runs import ROOT, command_line
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train import engines
from upcycled_moe.train.balancing import BalancingMixin
from upcycled_moe.train.engines import data_parallel_size, lay_out_processes
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

DEEPSPEED = {
    "DS_ACCELERATOR": "cpu",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "UpcycledQwenMoeSparseMoeBlock",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    "ACCELERATE_GRADIENT_CLIPPING": "auto",
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
    pytest.param(
        2,
        # With use_cpu Accelerate passes over DeepSpeed.
        {"use_cpu": False},
        DEEPSPEED,
        id="zero3",
        marks=pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed"),
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
        # The checkpoint is within it, when the optimizer has nothing to remember of most weights.
        "router_warmup_steps": 2,
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


def _assert_same_run(output_dir, reference, *, but=()):
    for entry, expected in zip(_log(output_dir), _log(reference), strict=True):
        assert entry["step"] == expected["step"]
        for key in expected:
            if key.endswith(but):
                continue
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
    # Those of a batch that several processes share are counted once.
    assert "4 steps, 1,024 tokens" in output_dir.with_suffix(".log").read_text()
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


@pytest.mark.distributed
def test_mixed_precision_of_shards_rounds_no_loss(settings, make_moe_checkpoint, tmp_path):
    settings = {**settings, "model_name_or_path": make_moe_checkpoint(), "max_steps": 2, "save_strategy": "no"}
    settings |= {"bf16": True, "tokens_per_step": 512, "router_warmup_steps": 0}
    assert main(command_line({**settings, "output_dir": tmp_path / "one_process"})) == 0
    # The launcher's precision decides, as in its files.
    _run(settings, tmp_path / "shards", 2, FSDP | {"ACCELERATE_MIXED_PRECISION": "bf16"})
    for entry, expected in zip(_log(tmp_path / "shards"), _log(tmp_path / "one_process"), strict=True):
        for name in {"lm_loss", "router/aux_loss", "eval_loss"} & entry.keys():
            assert entry[name] == pytest.approx(expected[name], rel=0.01)
            assert torch.tensor(entry[name]) != torch.tensor(entry[name]).bfloat16().float(), (name, entry[name])


@pytest.mark.distributed
def test_parts_of_a_sequence_train_as_the_whole_one(settings, tmp_path):
    """Ring attention. The load-balancing loss is off: each part has one of its own."""
    # AdamW would turn the rounding of its smallest gradients into steps of full size.
    optimizer = {"optim": "sgd", "learning_rate": 0.1}
    settings = {**settings, **optimizer, "document_mask": False, "router_aux_loss_coef": 0.0, "save_strategy": "no"}
    assert main(command_line({**settings, "output_dir": tmp_path / "one_process"})) == 0
    _run(settings, tmp_path / "parts", 2, FSDP | _layout(cp=2))
    _assert_same_run(tmp_path / "parts", tmp_path / "one_process", but="aux_loss")
    # A batch that two processes share is counted once.
    assert "2 processes, 256 tokens a step" in (tmp_path / "parts.log").read_text()


def _arguments(num_processes, **given):
    return SimpleNamespace(
        world_size=num_processes,
        fsdp=False,
        load_best_model_at_end=given.pop("load_best_model_at_end", False),
        accelerator_config=SimpleNamespace(dispatch_batches=None),
        **{"tensor_parallel_size": 1, "expert_parallel_size": 1, **given},
    )


BLOCKS = SimpleNamespace(block_size=64, document_mask=False)


@pytest.mark.parametrize(
    ("num_processes", "given", "environment", "expected"),
    [
        (4, {}, {}, 4),
        (4, {}, _layout(dp_replicate=2, dp_shard=2), 4),
        (4, {}, _layout(dp_shard=2, cp=2), 2),
        pytest.param(4, {"tensor_parallel_size": 2}, {}, 2, marks=shards_at_load),
        pytest.param(4, {"expert_parallel_size": 2}, {}, 4, marks=shards_at_load),
    ],
)
def test_batches_are_those_of_processes_that_have_their_own(monkeypatch, num_processes, given, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = _arguments(num_processes, **given)
    lay_out_processes(args, BLOCKS)
    assert data_parallel_size(args) == expected
    # The first process must not deal out the batches where several processes need the same one.
    assert args.accelerator_config.dispatch_batches is (False if expected < num_processes else None)


@pytest.mark.parametrize(
    ("given", "environment", "blocks", "message"),
    [
        ({"tensor_parallel_size": 0}, {}, {}, "tensor_parallel_size=0 must be at least 1"),
        ({}, _layout(dp_shard=2, cp=4), {}, "dp_shard=2 x cp=4 = 8 processes, but 4 started"),
        ({}, _layout(tp=2), {}, "parallelism_config_tp_size=2 is not supported here; .* give tensor_parallel_size"),
        ({}, _layout(sp=4), {}, "parallelism_config_sp_size=4 is not supported here; use parallelism_config_cp_size"),
        ({}, _layout(cp=4), {"block_size": 68}, "block_size=68 cannot be cut .* multiple of 8"),
        ({}, _layout(cp=4), {"document_mask": True}, "set document_mask=false"),
        pytest.param(
            {"tensor_parallel_size": 3}, {}, {}, "does not divide the number of processes, 4", marks=shards_at_load
        ),
        pytest.param(
            {"tensor_parallel_size": 4, "expert_parallel_size": 2}, {}, {}, "must be a multiple", marks=shards_at_load
        ),
        pytest.param(
            {"expert_parallel_size": 2, "load_best_model_at_end": True},
            {},
            {},
            "load_best_model_at_end=true does not go with",
            marks=shards_at_load,
        ),
        pytest.param({"expert_parallel_size": 2}, FSDP, {}, "not with FSDP, DeepSpeed", marks=shards_at_load),
    ],
)
def test_a_layout_that_does_not_suit_is_refused_with_a_way_out(monkeypatch, given, environment, blocks, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        lay_out_processes(_arguments(4, **given), SimpleNamespace(**{**vars(BLOCKS), **blocks}))


def test_an_older_transformers_is_told_apart(monkeypatch):
    @dataclass
    class OlderConfig:
        tp_size: int = 1

    monkeypatch.setattr(engines, "DistributedConfig", OlderConfig)
    with pytest.raises(SettingsError, match="expert_parallel_size=2 needs a newer Transformers"):
        lay_out_processes(_arguments(4, expert_parallel_size=2), BLOCKS)


@shards_at_load
def test_a_wrong_number_of_processes_is_one_line(settings, tmp_path, capsys):
    assert main(command_line({**settings, "output_dir": tmp_path / "out", "expert_parallel_size": 2})) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(
        "train.py: tensor_parallel_size=1, expert_parallel_size=2 does not divide"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_a_ready_configuration_whose_first_line_explains_it(config):
    assert config.read_text().startswith("# ")
    given = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    given.nondefault = set()
    args, _, _ = _validate_launch_command(given)
    settings = yaml.safe_load(config.read_text())
    assert args.num_processes == settings["num_processes"]
    layout = settings.get("parallelism_config", {})
    for name, size in layout.items():
        assert getattr(args, name) == size
    sizes = [size for name, size in layout.items() if name.endswith("_size")]
    assert math.prod(sizes) in (1, args.num_processes)
    for group in ("fsdp_config", "deepspeed_config"):
        for name, value in settings.get(group, {}).items():
            assert getattr(args, name) == value


@pytest.mark.parametrize(
    ("fsdp_version", "is_deepspeed_enabled", "message"), [(1, False, "set fsdp_version to 2"), (2, True, "no bf16")]
)
def test_engines_that_convert_biases_are_refused(fsdp_version, is_deepspeed_enabled, message):
    """FSDP version 1 and mixed precision of DeepSpeed, which themselves do not start on a CPU."""
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=fsdp_version))
    accelerator = SimpleNamespace(state=state, mixed_precision="bf16")
    trainer = SimpleNamespace(accelerator=accelerator, is_deepspeed_enabled=is_deepspeed_enabled)
    with pytest.raises(SettingsError, match=message):
        BalancingMixin._check_biases_can_be_sharded(trainer)
