"""Tensor and expert parallelism over two processes compute what one process does, gradients included."""

import json
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


TORCHRUN = "from torch.distributed.run import main; main()"


@pytest.mark.distributed
def test_two_processes_compute_what_one_does(warm_python, make_moe, tmp_path):
    for name, fields in MODELS.items():
        make_moe(router_aux_loss_coef=0.3, router_z_loss_coef=0.1, **fields).save_pretrained(tmp_path / name)
    names = {"tensor": list(MODELS), "expert": list(MODELS)}
    if OLD_EXPERT_PARALLELISM:
        names["expert"] = [name for name in MODELS if not UpcycledQwenMoeConfig(**MODELS[name]).has_empty_slots]
    folders = {plan: [str(tmp_path / name) for name in names[plan]] for plan in names}
    report_path = tmp_path / "report.json"
    worker = Path(__file__).with_name("distributed_worker.py")

    arguments = ["--standalone", "--nproc-per-node", 2, worker, report_path, json.dumps(folders)]
    process = warm_python.run(TORCHRUN, *arguments, OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    assert "match nothing" not in process.stderr
    assert "were not applied" not in process.stderr

    reports = json.loads(report_path.read_text())
    assert {plan: list(reports[plan]) for plan in reports} == names
    for plan, name in ((plan, name) for plan, models in names.items() for name in models):
        report = reports[plan][name]
        assert report["processes"] == 2
        expected_shards = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
        if plan == "tensor":
            expected_shards |= {"self_attn.q_proj.weight", "self_attn.o_proj.weight"}
            if "shared_expert_intermediate_size" in MODELS[name]:
                expected_shards.add("mlp.shared_expert.down_proj.weight")
        assert expected_shards <= set(report["sharded"])
        assert report["logits"] <= 1e-5, (plan, name)
        assert report["loss"] <= 1e-5, (plan, name)
        far = [parameter for parameter, difference in report["gradients"].items() if difference > 1e-5]
        assert far == [], (plan, name)


@pytest.mark.parametrize(
    "fields", [{"router_selection": "top_p", "router_top_p": 0.5}, {"num_zero_experts": 1}], ids=str
)
def test_expert_parallelism_that_knows_no_empty_slots_is_not_offered(fields):
    has_plan = UpcycledQwenMoeConfig(**fields).base_model_ep_plan is not None

    assert has_plan == (not OLD_EXPERT_PARALLELISM)
    assert UpcycledQwenMoeConfig().base_model_ep_plan is not None
