"""A CUDA device, divided into lanes."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from nf_kernels.lanes.cuda.lane import CudaLane, GreenContext
from nf_kernels.lanes.cuda.runtime import CudaRuntime, Runtime
from nf_kernels.lanes.cuda.sm_grant import grant_sms
from nf_kernels.lanes.lane import Lane, grant

MECHANISMS = ("green_contexts", "capped", "shared")


def partition_cuda(
    device: torch.device,
    shares: list[float],
    *,
    mechanism: str | None,
    runtime: Runtime | None = None,
) -> list[Lane]:
    """Lanes of a CUDA device.

    Args:
        device: Which; without a number, torch's current one.
        shares: As `lanes.partition`.
        mechanism: One of `MECHANISMS`; None is the first.
        runtime: What torch and the driver do.

    Raises:
        ValueError: As `lanes.partition`.
        RuntimeError: There is no such device, or the driver refuses.
    """
    mechanism = mechanism or MECHANISMS[0]
    if mechanism not in MECHANISMS:
        raise ValueError(
            f"mechanism is {mechanism!r}; expected one of {', '.join(MECHANISMS)} on cuda"
        )
    if runtime is None:
        if not torch.cuda.is_available():
            raise RuntimeError(f"device is {str(device)!r}, and torch finds no CUDA device")
        runtime = CudaRuntime()
        number = torch.cuda.current_device() if device.index is None else device.index
    else:
        number = device.index or 0
    sms = runtime.sm_count(number)
    if mechanism == "green_contexts":
        return _green_lanes(runtime, number, sms, shares)
    sizes = [len(units) for units in grant(range(sms), shares)]
    capped = mechanism == "capped"
    by_size = sorted(set(sizes), reverse=True)
    lowest, highest = runtime.priorities()
    return [
        CudaLane(
            runtime,
            number,
            units=tuple(range(sms)),
            sm_count=size if capped else sms,
            device_sms=sms,
            exclusive=len(shares) == 1,
            capped=capped,
            priority=max(highest, lowest - by_size.index(size)) if capped else lowest,
        )
        for size in sizes
    ]


def _green_lanes(runtime: Runtime, device: int, sms: int, shares: list[float]) -> list[Lane]:
    grant(range(sms), shares)  # refuses impossible shares before the driver is asked
    division = runtime.divide(device)
    granted = grant_sms(
        groups=len(division.groups),
        group_size=division.group_size,
        remainder=division.remainder_size,
        shares=shares,
    )
    contexts: dict[tuple[int, ...], GreenContext] = {}
    lanes: list[Lane] = []
    with ExitStack() as made_so_far:  # which is closed if what follows cannot be made
        for part in granted:
            if part.groups not in contexts:
                resources = [division.groups[number] for number in part.groups]
                if part.remainder:
                    resources.append(division.remainder)
                handle = runtime.create_context(device, resources)
                contexts[part.groups] = GreenContext(runtime, handle)
            lane = CudaLane(
                runtime,
                device,
                units=part.units,
                sm_count=len(part.units),
                device_sms=sms,
                exclusive=sum(part.groups == other.groups for other in granted) == 1,
                context=contexts[part.groups],
            )
            made_so_far.callback(lane.close)
            lanes.append(lane)
        made_so_far.pop_all()
    return lanes
