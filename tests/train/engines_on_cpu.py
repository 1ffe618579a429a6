"""Run the training script on CPU processes with engines that their libraries offer for accelerators only."""

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
    """Do what torch's ring attention does, with the attention kernel of CPUs, which it has no entry for."""
    mesh = next(arg for arg in args if isinstance(arg, DTensor)).device_mesh
    local = [arg.to_local() if isinstance(arg, DTensor) else arg for arg in args]
    names = [argument.name for argument in op_call._schema.arguments]
    given = {**dict(zip(names, local, strict=False)), "dropout_p": 0.0, "scale": kwargs.get("scale")}
    if op_call is FORWARD:
        results = ring._templated_ring_attention(mesh.get_group(), 2, FORWARD, **given)
    else:
        gradient = given.pop("grad_out")
        results = ring._templated_ring_attention_backward(
            mesh.get_group(), 2, BACKWARD, grad_out=gradient, grad_out_name="grad_out", **given
        )
    return tuple(DTensor.from_local(result, mesh, [Shard(2)]) for result in results)


def offer_engines_on_cpu() -> None:
    """Let this process use the engines that its environment asks for, as if it had an accelerator."""
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        # A faster exchange within a machine, which is compiled where it is first used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
        return
    AcceleratorState.__init__ = _init_as_on_accelerators
    ring.custom_ops |= dict.fromkeys((FORWARD, BACKWARD), _ring_attention_on_cpu)


if __name__ == "__main__":
    offer_engines_on_cpu()
    sys.argv[0] = str(TRAIN_SCRIPT)
    runpy.run_path(str(TRAIN_SCRIPT), run_name="__main__")
