"""Run by torchrun in each process: loads every folder with parallel plans and without, and compares them.

torchrun --nproc-per-node 2 distributed_worker.py REPORT '{"tensor": [FOLDER, …], "expert": [FOLDER, …]}'
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_upcycled_moe import UpcycledQwenMoeForCausalLM


def parallel_config(plan: str) -> DistributedConfig:
    world_size = dist.get_world_size()
    if plan == "tensor":
        return DistributedConfig(tp_size=world_size, tp_plan="auto")
    if Version(transformers.__version__) < Version("5.20"):
        return DistributedConfig(tp_size=world_size, tp_plan="auto", enable_expert_parallel=True)
    return DistributedConfig(tp_size=world_size, ep_size=world_size)


def largest_difference(parallel: torch.Tensor, single: torch.Tensor) -> float:
    if isinstance(parallel, DTensor):
        parallel = parallel.full_tensor()
    return (parallel - single).abs().max().item()


def compare(plan: str, folder: str) -> dict:
    single = UpcycledQwenMoeForCausalLM.from_pretrained(folder)
    parallel = UpcycledQwenMoeForCausalLM.from_pretrained(folder, distributed_config=parallel_config(plan))
    tokens = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    sharded = [
        name
        for (name, parameter), reference in zip(parallel.named_parameters(), single.parameters(), strict=True)
        if (parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape != reference.shape
    ]
    report = {"processes": dist.get_world_size(), "sharded": sorted({name.split(".", 3)[-1] for name in sharded})}

    with torch.no_grad():
        report["logits"] = largest_difference(parallel.eval()(tokens).logits, single.eval()(tokens).logits)
    losses = []
    for model in (parallel, single):
        outputs = model.train()(tokens, labels=tokens)
        outputs.loss.backward()
        losses.append(outputs.loss.detach())
    report["loss"] = largest_difference(*losses)
    report["gradients"] = {}
    references = dict(single.named_parameters())
    for name, parameter in parallel.named_parameters():
        report["gradients"][name] = largest_difference(parameter.grad, references[name].grad)
    return report


def main():
    report_path, folders_of_plans = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    reports = {
        plan: {Path(folder).name: compare(plan, folder) for folder in folders}
        for plan, folders in folders_of_plans.items()
    }
    if dist.get_rank() == 0:
        Path(report_path).write_text(json.dumps(reports))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
