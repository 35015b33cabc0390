"""Lanes of a CUDA device: streams on SMs of their own, of capped kernels, or side by side.

Not yet run on a device; docs/gpu-status.md says what is. Three mechanisms:

- `green_contexts`: the driver divides the SMs once into groups, and each lane's stream belongs to a
  context that has some of them. `torch.cuda.green_contexts` divides the whole device anew for each
  context, so that two of its contexts share SMs; the driver's own functions are called through
  cuda-bindings instead.
- `capped`: a stream for each lane, with a priority and a number of SMs. Kernels that can keep to a
  number (our products and copies) do; others run on all SMs. Smaller lanes have the higher
  priority: what would fill the device must not keep a small kernel out.
- `shared`: a stream for each lane, and the device divides itself.
"""

from nf_kernels.lanes.cuda.lane import CudaEvent, CudaLane, current_lane
from nf_kernels.lanes.cuda.partition import MECHANISMS, partition_cuda
from nf_kernels.lanes.cuda.runtime import CudaRuntime, Runtime, SmGroups
from nf_kernels.lanes.cuda.sm_grant import SmGrant, grant_sms

__all__ = [
    "MECHANISMS",
    "CudaEvent",
    "CudaLane",
    "CudaRuntime",
    "Runtime",
    "SmGrant",
    "SmGroups",
    "current_lane",
    "grant_sms",
    "partition_cuda",
]
