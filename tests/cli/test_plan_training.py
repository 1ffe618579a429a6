"""`upcycled-moe plan --train`: what a run will cost, of a dense checkpoint and of one with experts."""

import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import Qwen2Config, Qwen2MoeConfig

import upcycled_moe.train
from modeling_upcycled_moe import UpcycledQwenMoeConfig
from upcycled_moe.common.flops import GPUS, training_flops_per_token
from upcycled_moe.conversion.source import expected_shapes


CONFIGS = Path(upcycled_moe.train.__file__).parent / "configs"
QWEN2_5_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
RECIPE = CONFIGS / "router_upcycling.yaml"
FSDP2 = CONFIGS / "accelerate" / "fsdp2.yaml"


@pytest.fixture(scope="module")
def moe_7b(tmp_path_factory):
    """Folder with a configuration only: a plan reads no weights of a model that is not converted."""
    folder = tmp_path_factory.mktemp("models") / "moe"
    UpcycledQwenMoeConfig(**QWEN2_5_7B, **EXPERTS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense_7b(tmp_path_factory):
    """A checkpoint whose weights are a hole: of full size, but empty on the disk."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    config = Qwen2Config(**QWEN2_5_7B, architectures=["Qwen2ForCausalLM"])
    header, end = {}, 0
    for name, shape in expected_shapes(config).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    config.save_pretrained(folder)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture
def training_plan(upcycled_moe):
    """`training_plan(…)`: what `plan … --json` says of training."""

    def plan(*arguments):
        status, out, err = upcycled_moe("plan", *arguments, "--json")
        assert status == 0, err
        return json.loads(out)["training"]

    return plan


def test_a_dense_checkpoint_is_planned_as_what_it_becomes(training_plan, dense_7b, moe_7b):
    training = ["--train", RECIPE, "--accelerate", FSDP2]
    dense = training_plan(dense_7b, "--router", "linear", *training)
    moe = training_plan(moe_7b, *training)
    # Its mixture routers alone make the difference.
    assert dense["memory_per_gpu"]["weights"] == pytest.approx(moe["memory_per_gpu"]["weights"], rel=0.02)
    config = UpcycledQwenMoeConfig(**QWEN2_5_7B, **EXPERTS, router_type="linear")
    assert dense["flops_per_token"] == training_flops_per_token(config, 4096)


def test_the_figures_follow_from_the_settings(training_plan, moe_7b):
    plan = training_plan(moe_7b, "--train", RECIPE, "max_steps=100", "--accelerate", FSDP2, "--gpu", "h100")
    layout = plan["layout"]
    assert (layout["num_processes"], layout["engine"], layout["mixed_precision"]) == (8, "fsdp2", "bfloat16")
    assert (layout["micro_batch_size"], layout["gradient_accumulation_steps"]) == (4, 32)
    assert plan["tokens_per_step"] == 4194304
    assert plan["total_tokens"] == 100 * 4194304
    assert plan["total_flops"] == plan["total_tokens"] * plan["flops_per_token"]
    assert plan["hours_at_assumed_mfu"] == pytest.approx(plan["total_flops"] / (8 * 0.4 * 989e12) / 3600)
    assert plan["gpu_memory_bytes"] == round(GPUS["h100"].memory_gb * 10**9) == 84_900_000_000
    assert plan["assumed_mfu"] == 0.4
    assert plan["missing_bytes"] == plan["memory_per_gpu"]["total_bytes"] - plan["gpu_memory_bytes"]


def test_gradients_that_wait_whole_for_the_last_micro_batch_are_said(training_plan, moe_7b):
    setting = "accelerator_config={gradient_accumulation_kwargs: {sync_each_batch: false}}"
    plan = training_plan(moe_7b, "--train", RECIPE, "max_steps=100", setting, "--accelerate", FSDP2)
    assert "sync_each_batch" in plan["memory_per_gpu"]["notes"][0]


def test_what_is_given_on_the_command_line_wins(training_plan, moe_7b):
    plan = training_plan(
        *(moe_7b, "--train", RECIPE, "tokens_per_step=65536", "per_device_train_batch_size=2", "--accelerate", FSDP2),
        *("--num-processes", "2", "--gpu", "h100", "--gpu-memory", "100GiB", "--mfu", "0.2"),
    )
    assert plan["layout"]["gradient_accumulation_steps"] == 4
    assert plan["gpu_memory_bytes"] == 100 * 2**30
    assert plan["hours_at_assumed_mfu"] == pytest.approx(plan["total_flops"] / (2 * 0.2 * 989e12) / 3600)


def test_what_does_not_fit_gets_advice_that_does(upcycled_moe, training_plan, moe_7b):
    command = (moe_7b, "--train", RECIPE, "--accelerate", CONFIGS / "accelerate" / "ddp.yaml", "--gpu-memory", "80GB")
    plan = training_plan(*command)
    assert plan["missing_bytes"] > 0
    assert set(plan["remedies"]) >= {"gradient_checkpointing=true", "optim=adamw_bnb_8bit", "all of these"}
    assert all(size < plan["memory_per_gpu"]["total_bytes"] for size in plan["remedies"].values())
    assert list(plan["remedies"].values())[-1] <= 80e9
    status, out, _ = upcycled_moe("plan", *command)
    assert status == 0
    assert "Does not fit into 80 GB" in out
    assert list(plan["remedies"])[-1] in out


def test_a_stock_moe_fits_without_a_word_of_conversion(upcycled_moe, tmp_path):
    Qwen2MoeConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(tmp_path)
    status, out, _ = upcycled_moe("plan", tmp_path, "--train", CONFIGS / "small.yaml", "--gpu-memory", "24GB")
    assert status == 0
    assert "Fits into 24 GB" in out
    assert "Preserves the function" not in out
    status, _, err = upcycled_moe("plan", tmp_path, "--train", CONFIGS / "small.yaml", "loss_chunk_tokens=512")
    assert status == 2
    assert "loss_chunk_tokens=512, but qwen2_moe models know no such loss" in err


@pytest.mark.parametrize("name", sorted(path.name for path in (CONFIGS / "accelerate").glob("*.yaml")))
def test_every_configuration_of_accelerate_is_understood(training_plan, moe_7b, name):
    settings = ["document_mask=false"] * (name == "context_parallel.yaml")
    plan = training_plan(moe_7b, "--train", RECIPE, *settings, "--accelerate", CONFIGS / "accelerate" / name)
    engines = {"deepspeed_zero3": "zero3", "fsdp2": "fsdp2", "hsdp_nodes": "fsdp2", "context_parallel": "fsdp2"}
    assert plan["layout"]["engine"] == engines.get(name.removesuffix(".yaml"), "ddp")
    assert plan["layout"]["shard_size"] == (8 if name in ("hsdp_nodes.yaml", "context_parallel.yaml") else None)


def test_experts_are_shared_out_at_load(training_plan, moe_7b):
    settings = ["--train", RECIPE, "expert_parallel_size=8", "--num-processes", 8]
    assert training_plan(moe_7b, *settings)["layout"]["engine"] == "load"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", RECIPE, "max_step=3"], "unknown key 'max_step'; did you mean 'max_steps'?"),
        (["--train", "absent.yaml"], "absent.yaml: cannot be read"),
        (["--train", RECIPE, "--gpu", "h101"], "--gpu 'h101' is not known; known:"),
        (["--train", RECIPE, "--gpu-memory", "many"], "--gpu-memory='many' is not a size"),
        (["--train", RECIPE, "--mfu", "40"], "--mfu 40 is outside (0, 1]."),
        (["--train", RECIPE, "--num-processes", "0"], "--num-processes 0 must be at least 1."),
        (["--train", RECIPE, "--accelerate", RECIPE], "unknown key 'block_size'"),
        (["--train", RECIPE, "tokens_per_step=5"], "tokens_per_step=5 is not a multiple of 16384"),
        (["--train", RECIPE, "tensor_parallel_size=3"], "does not divide the number of processes, 1"),
        (["--gpu", "h100"], "--gpu is of the plan of a training run; give --train too."),
    ],
)
def test_wrong_settings_are_one_line(upcycled_moe, moe_7b, arguments, message):
    status, out, err = upcycled_moe("plan", moe_7b, *arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


ACCELERATE = CONFIGS / "accelerate"


@pytest.mark.parametrize(
    ("settings", "accelerate", "message"),
    [
        (["tokens_per_step=32768", "gradient_accumulation_steps=4"], "one_gpu", "say the same thing; give one"),
        (["block_size=-5"], "one_gpu", "block_size=-5 must be at least 2."),
        (["per_device_train_batch_size=0"], "one_gpu", "per_device_train_batch_size=0 must be at least 1."),
        (["gradient_accumulation_steps=0"], "one_gpu", "gradient_accumulation_steps=0 must be at least 1."),
        (["loss_chunk_tokens=-1"], "one_gpu", "loss_chunk_tokens=-1 is negative"),
        (["max_steps=0"], "one_gpu", "max_steps=0 must be at least 1"),
        (["optim=foo"], "one_gpu", "optim=foo is not known; allowed:"),
        (["attn_implementation=foo"], "one_gpu", "attn_implementation=foo is not known; allowed:"),
        (["experts_implementation=foo"], "one_gpu", "experts_implementation=foo is not known; allowed:"),
        (["router_warmup_steps=20", "max_steps=10"], "one_gpu", "with max_steps=10"),
        (["expected_processes=8"], "one_gpu", "expected_processes=8, but 1 started"),
        (["peak_flops_per_device=0"], "one_gpu", "peak_flops_per_device=0 must be above 0"),
        (["deepspeed=ds.json"], "one_gpu", "deepspeed=ds.json as a setting of the run is not estimated"),
        (["fsdp=full_shard"], "one_gpu", "as a setting of the run is not estimated"),
        (["expert_parallel_size=3"], "expert_parallel", "does not divide the number of processes, 8"),
        (["expert_parallel_size=8"], "fsdp2", "not with FSDP, DeepSpeed or a parallelism_config"),
        ([], "context_parallel", "document_mask=true does not go with parallelism_config_cp_size=4"),
        (["document_mask=false", "block_size=4095"], "context_parallel", "block_size=4095 cannot be cut"),
    ],
)
def test_what_a_run_refuses_its_plan_refuses(upcycled_moe, moe_7b, settings, accelerate, message):
    # The recipe's own batch is none of those that are given here.
    command = ("plan", moe_7b, "--train", CONFIGS / "small.yaml", *settings)
    status, out, err = upcycled_moe(*command, "--accelerate", ACCELERATE / f"{accelerate}.yaml")
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "group", "changes", "message"),
    [
        (
            "deepspeed_zero3",
            "deepspeed_config",
            {"offload_optimizer_device": "cpu"},
            "offload_optimizer_device=cpu is",
        ),
        ("deepspeed_zero3", "deepspeed_config", {"offload_param_device": "nvme"}, "offload_param_device=nvme is not"),
        ("deepspeed_zero3", "deepspeed_config", {"zero_stage": 2}, "zero_stage=2 is not estimated; only 3 is."),
        ("deepspeed_zero3", "deepspeed_config", {"deepspeed_config_file": "d.json"}, "deepspeed_config_file=d.json"),
        ("fsdp2", "fsdp_config", {"fsdp_offload_params": True}, "fsdp_offload_params=True is not estimated"),
        ("fsdp2", "fsdp_config", {"fsdp_version": 1}, "fsdp_version=1 is not estimated; only 2 is"),
        ("fsdp2", "parallelism_config", {"parallelism_config_tp_size": 2}, "tp_size=2 is not supported here"),
        ("fsdp2", "parallelism_config", {"parallelism_config_dp_replicate_size": 4}, "= 4 processes, but 8 started"),
        ("hsdp_nodes", None, {"num_processes": 8}, "dp_replicate=2 x dp_shard=8 x cp=1 = 16 processes, but 8 started"),
        ("ddp", None, {"num_processes": -1}, "num_processes=-1 must be at least 1."),
        ("ddp", None, {"distributed_type": "XLA"}, "distributed_type=XLA is not estimated; allowed: NO, MULTI_GPU"),
    ],
)
def test_a_launch_that_is_not_estimated_or_does_not_start_is_refused(
    upcycled_moe, moe_7b, tmp_path, name, group, changes, message
):
    path = _changed(tmp_path, name, group, changes)
    status, out, err = upcycled_moe("plan", moe_7b, "--train", RECIPE, "--accelerate", path)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def _changed(folder, name, group, changes):
    """A ready configuration with other values, in `folder`."""
    config = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
    (config if group is None else config.setdefault(group, {})).update(changes)
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    return folder / "accelerate.yaml"


def test_copies_are_not_shards(training_plan, moe_7b, tmp_path):
    path = _changed(tmp_path, "fsdp2", "parallelism_config", {"parallelism_config_dp_replicate_size": 8})
    plan = training_plan(moe_7b, "--train", RECIPE, "--accelerate", path)
    shards = training_plan(moe_7b, "--train", RECIPE, "--accelerate", FSDP2)
    assert plan["layout"]["shard_size"] == 1
    assert plan["memory_per_gpu"]["weights"] == pytest.approx(8 * shards["memory_per_gpu"]["weights"], rel=1e-6)


def test_a_peak_that_is_given_makes_the_hours(upcycled_moe, training_plan, moe_7b):
    command = (moe_7b, "--train", RECIPE, "max_steps=100", "peak_flops_per_device=1e15", "--gpu-memory", "100GB")
    for gpu in ([], ["--gpu", "h100"]):
        plan = training_plan(*command, *gpu)
        assert plan["hours_at_assumed_mfu"] == pytest.approx(plan["total_flops"] / (0.4 * 1e15) / 3600)
    _, out, _ = upcycled_moe("plan", *command)
    assert "40% of the peak of 1 x 1,000 TFLOP/s" in " ".join(out.split())


def test_a_gpu_that_is_here_says_its_own_memory(monkeypatch, training_plan, moe_7b):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3 MIG 3g.40gb")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=41_876_979_712))
    plan = training_plan(moe_7b, "--train", RECIPE, "max_steps=100")
    assert plan["gpu_memory_bytes"] == 41_876_979_712
    assert plan["hours_at_assumed_mfu"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-experts", "4", "--router", "linear"], "--num-experts, --router: of a conversion, but"),
        (["--recipe", "router_upcycling_8x0.5b"], "--recipe: of a conversion, but"),
        (["OUT"], "OUT=OUT:"),
    ],
)
def test_a_checkpoint_with_experts_is_not_converted_again(upcycled_moe, moe_7b, options, message):
    status, out, err = upcycled_moe("plan", moe_7b, *options, "--train", RECIPE)
    assert (status, out) == (2, "")
    assert message in err
    assert "has experts already" in err
    assert err.count("\n") == 1


def test_no_checkpoint_is_an_error(upcycled_moe):
    status, _, err = upcycled_moe("plan", "--train", RECIPE)
    assert status == 2
    assert "the checkpoint is missing: give it as DENSE" in err
