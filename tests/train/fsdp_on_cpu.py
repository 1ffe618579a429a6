"""Run the training script with Accelerate's FSDP2 on CPU processes, which Accelerate offers for accelerators only."""

import runpy
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState
from training_runs import TRAIN_SCRIPT


_init = AcceleratorState.__init__


def _init_with_fsdp(self, *args, **kwargs):
    # Accelerate reads its FSDP settings for several GPUs, not for several CPUs; nothing below that choice differs.
    PartialState(cpu=True)
    if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _init(self, *args, **kwargs)
    assert self.distributed_type == DistributedType.FSDP, self.distributed_type


if __name__ == "__main__":
    AcceleratorState.__init__ = _init_with_fsdp
    sys.argv[0] = str(TRAIN_SCRIPT)
    runpy.run_path(str(TRAIN_SCRIPT), run_name="__main__")
