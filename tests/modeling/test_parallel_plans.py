"""Tensor and expert parallelism over two processes compute what one process does, gradients included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from modeling_upcycled_moe import UpcycledQwenMoeConfig


# Renumbers what a router returns, and takes an empty slot for an expert.
OLD_EXPERT_PARALLELISM = Version(transformers.__version__) < Version("5.20")

MODELS = {
    "mixture": {},
    "best-key": {
        "base_model_type": "qwen3",
        "num_routers": 8,
        "router_pooling": "max",
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "linear": {"router_type": "linear", "shared_expert_intermediate_size": 24},
    "grouped": {"router_type": "mlp", "router_selection": "grouped_top_k", "num_expert_groups": 2},
    "biased": {
        "router_score_function": "sigmoid",
        "use_router_bias": True,
        "shared_expert_intermediate_size": 24,
        "shared_expert_gating": "plain",
    },
    "top p": {"router_selection": "top_p", "router_top_p": 0.5},
    "without computation": {"num_copy_experts": 1, "num_constant_experts": 1},
    "float32 routers": {"router_dtype": "float32"},
    "complement": {"shared_expert_intermediate_size": 24, "shared_expert_gating": "complement"},
}


@pytest.mark.distributed
@pytest.mark.parametrize("plan", ["tensor", "expert"])
def test_two_processes_compute_what_one_does(make_moe, tmp_path, plan):
    folders = []
    models = MODELS
    if plan == "expert" and OLD_EXPERT_PARALLELISM:
        models = {
            name: fields for name, fields in MODELS.items() if not UpcycledQwenMoeConfig(**fields).has_empty_slots
        }
    for name, fields in models.items():
        folders.append(str(tmp_path / name))
        make_moe(router_aux_loss_coef=0.3, router_z_loss_coef=0.1, **fields).save_pretrained(folders[-1])
    report_path = tmp_path / "report.json"
    worker = Path(__file__).with_name("distributed_worker.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    process = subprocess.run(
        [*torchrun, str(worker), plan, str(report_path), *folders],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "match nothing" not in process.stderr
    assert "were not applied" not in process.stderr

    reports = json.loads(report_path.read_text())
    assert reports.keys() == models.keys()
    for name, report in reports.items():
        assert report["processes"] == 2
        expected_shards = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
        if plan == "tensor":
            expected_shards |= {"self_attn.q_proj.weight", "self_attn.o_proj.weight"}
            if "shared_expert_intermediate_size" in models[name]:
                expected_shards.add("mlp.shared_expert.down_proj.weight")
        assert expected_shards <= set(report["sharded"])
        assert report["logits"] <= 1e-5
        assert report["loss"] <= 1e-5
        assert [name for name, difference in report["gradients"].items() if difference > 1e-5] == []


@pytest.mark.parametrize(
    "fields", [{"router_selection": "top_p", "router_top_p": 0.5}, {"num_zero_experts": 1}], ids=str
)
def test_expert_parallelism_that_knows_no_empty_slots_is_not_offered(fields):
    has_plan = UpcycledQwenMoeConfig(**fields).base_model_ep_plan is not None

    assert has_plan == (not OLD_EXPERT_PARALLELISM)
    assert UpcycledQwenMoeConfig().base_model_ep_plan is not None
