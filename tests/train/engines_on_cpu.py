"""Run the training script with those of Accelerate's engines on CPU processes that it offers for accelerators only."""

import os
import runpy
import sys

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from training_runs import TRAIN_SCRIPT


FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_init = AcceleratorState.__init__


def _init_as_on_accelerators(self, *args, **kwargs):
    # Accelerate reads its settings of FSDP2 and of the layout for several GPUs, not for several CPUs; nothing below
    # that choice differs.
    PartialState(cpu=True)
    if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _init(self, *args, **kwargs)
    if "ACCELERATE_USE_FSDP" in os.environ:
        assert self.distributed_type == DistributedType.FSDP, self.distributed_type


def _ring_attention_on_cpu(op_call, args, kwargs):
    """torch's ring attention with the attention kernel of CPUs, which it has no entry for."""
    queries = next(arg for arg in args if isinstance(arg, DTensor))
    mesh, local = queries.device_mesh, [arg.to_local() if isinstance(arg, DTensor) else arg for arg in args]
    names = [argument.name for argument in op_call._schema.arguments]
    given = {**dict(zip(names, local, strict=False)), "dropout_p": 0.0, "scale": kwargs.get("scale")}
    if op_call is FORWARD:
        results = ring._templated_ring_attention(mesh.get_group(), 2, FORWARD, **given)
    else:
        grad_out = given.pop("grad_out")
        results = ring._templated_ring_attention_backward(
            mesh.get_group(), 2, BACKWARD, grad_out=grad_out, grad_out_name="grad_out", **given
        )
    return tuple(DTensor.from_local(result, mesh, [Shard(2)]) for result in results)


if __name__ == "__main__":
    ring.custom_ops |= dict.fromkeys((FORWARD, BACKWARD), _ring_attention_on_cpu)
    AcceleratorState.__init__ = _init_as_on_accelerators
    sys.argv[0] = str(TRAIN_SCRIPT)
    runpy.run_path(str(TRAIN_SCRIPT), run_name="__main__")
