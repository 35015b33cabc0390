"""What a device can do at most, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nf_kernels.ops import OperationSet
from nf_runtime.device_stream import DeviceStream

_ROUNDS = 5
_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}  # far more than any cache holds
_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class DevicePeaks:
    """The best of some rounds.

    Attributes:
        flops_per_second: Of a large product of matrices.
        bytes_per_second: Of reading weights for one row.
    """

    flops_per_second: float
    bytes_per_second: float


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
    return DevicePeaks(2 * side**3 / compute, weight_bytes / memory)


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
            stream.record().wait()
            best = min(best, time.perf_counter() - started)
    return best
