"""Lanes: shares of one device that run operations at the same time."""

from collections.abc import Sequence

import torch

from nf_kernels.lanes.cpu import partition_cpu
from nf_kernels.lanes.lane import Event, Lane


def partition(
    device: torch.device | str, shares: Sequence[float], *, exclusive: bool = True
) -> list[Lane]:
    """Divide a device into lanes.

    On a CPU a lane is a set of cores of its own, with a native thread pinned to each.

    Args:
        device: The device.
        shares: Positive proportions, one per lane. What the hardware grants is rounded to whole
            units, and every unit belongs to a lane; each lane says what it got. With more lanes
            than units some share a unit, and say so.
        exclusive: False gives every lane all of the device: they run beside each other, and the
            hardware, or the operating system, divides it between them.

    Raises:
        ValueError: A share is not a positive number, or the device has no lanes.
        RuntimeError: The native kernels are missing.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        raise ValueError(f"device is {str(device)!r}; lanes exist on cpu")
    return partition_cpu(list(shares), exclusive=exclusive)


__all__ = ["Event", "Lane", "partition"]
