"""Measures what a device can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from nf_kernels import cost
from nf_kernels.collectives import Communicator
from nf_kernels.ops import OperationSet
from nf_runtime.device_stream import DeviceStream
from nf_runtime.pipeline.plan import DevicePeaks

_ROUNDS = 5
_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}  # far more than any cache holds
_SIDE = {"cpu": 2048, "cuda": 8192}
_SENT_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


def measure_peaks(
    operations: OperationSet, stream: DeviceStream, *, dtype: torch.dtype, device: torch.device
) -> DevicePeaks:
    """Measure a device by the operations that models are made of; takes a second or two.

    Args:
        operations: Its implementation.
        stream: Of the whole device, with nothing on it.
        dtype: Of activations and weights.
        device: Where the stream works.
    """
    side = _SIDE[device.type]
    compute = _linear(operations, stream, side, side, side, dtype, device)
    columns = 4096
    rows = _BYTES[device.type] // dtype.itemsize // columns
    memory = _linear(operations, stream, 1, columns, rows, dtype, device)
    weight_bytes = rows * columns * dtype.itemsize
    return DevicePeaks(
        flops_per_second=2 * side**3 / compute, bytes_per_second=weight_bytes / memory
    )


def measure_network(
    operations: OperationSet,
    stream: DeviceStream,
    *,
    dtype: torch.dtype,
    device: torch.device,
    communicator: Communicator,
) -> float:
    """Bytes per second that a rank sends in a large sum over all ranks; all of them call this.

    Args:
        operations: As `measure_peaks`, which is called alike.
        stream: Likewise.
        dtype: Of what is added.
        device: Where the stream works.
        communicator: Of the ranks, which do nothing else.

    Raises:
        CommunicatorError: Another rank has ended.
    """
    elements = _SENT_BYTES[device.type] // dtype.itemsize
    x = torch.zeros(elements, dtype=dtype, device=device)
    seconds = _seconds(stream, lambda: stream.call(partial(communicator.all_reduce, x)))
    ranks = communicator.world_size
    sum_ = cost.all_reduce(elements=elements, element_bytes=dtype.itemsize, ranks=ranks)
    return sum_.bytes_sent / seconds


def _linear(
    operations: OperationSet,
    stream: DeviceStream,
    rows: int,
    inner: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Seconds of a product [rows, inner] by [inner, columns]."""
    x = torch.ones(rows, inner, dtype=dtype, device=device)
    weight = operations.pack(torch.full((columns, inner), 0.5, dtype=dtype, device=device))
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    return _seconds(stream, lambda: operations["linear"](x=x, weight=weight, out=out))


def _seconds(stream: DeviceStream, function: Callable[[], None]) -> float:
    """The shortest of some rounds."""
    best = float("inf")
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            with stream:
                function()
            done = stream.record()
            done.wait()
            done.check()
            best = min(best, time.perf_counter() - started)
    return best
