"""Lanes: shares of one device that run operations at the same time."""

from collections.abc import Sequence

import torch

from nf_kernels.lanes.cpu import CpuEvent, CpuLane, partition_cpu, undivided_cpu
from nf_kernels.lanes.cuda import partition_cuda
from nf_kernels.lanes.lane import Event, Lane
from nf_kernels.lanes.program import (
    LAUNCH,
    SIGNAL,
    WAIT,
    CpuProgram,
    CpuRun,
    CpuSchedule,
    NotRecordable,
)


def partition(
    device: torch.device | str, shares: Sequence[float], *, mechanism: str | None = None
) -> list[Lane]:
    """Divide a device into lanes.

    On a CPU a lane is a set of cores with a native thread pinned to each, on a CUDA device a
    stream. What divides the device between them is the mechanism; only the first of each device
    gives a lane units that no other has.

    | device | mechanism | a lane has |
    | --- | --- | --- |
    | cpu | `cores` | cores of its own |
    | cpu | `shared` | all cores; the operating system divides them |
    | cuda | `green_contexts` | SMs of its own, in groups (of 8 on Hopper) |
    | cuda | `capped` | a number of SMs that some kernels keep to, and a priority |
    | cuda | `shared` | all SMs; the device divides them |

    Lanes by `capped` and `shared` have streams of torch, which are 32 for each priority: with more
    lanes some share one.

    Args:
        device: The device.
        shares: Positive proportions, one per lane. What the hardware grants is rounded to whole
            units, and every unit belongs to a lane; each lane says what it got. With more lanes
            than units some share a unit, and say so.
        mechanism: See above; None is the first that is listed for the device.

    Raises:
        ValueError: A share is not a positive number, or the device has no lanes, or none of this
            mechanism.
        RuntimeError: The native kernels are missing, or cuda-bindings, or the device.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return partition_cuda(torch.device(device), list(shares), mechanism=mechanism)
    if kind != "cpu":
        raise ValueError(f"device is {str(device)!r}; lanes exist on cpu and cuda")
    if mechanism not in (None, "cores", "shared"):
        raise ValueError(f"mechanism is {mechanism!r}; expected one of cores, shared on cpu")
    return partition_cpu(list(shares), exclusive=mechanism != "shared")


__all__ = [
    "LAUNCH",
    "SIGNAL",
    "WAIT",
    "CpuEvent",
    "CpuLane",
    "CpuProgram",
    "CpuRun",
    "CpuSchedule",
    "Event",
    "Lane",
    "NotRecordable",
    "partition",
    "undivided_cpu",
]
