"""Arrays on their way to the device."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; what the widest loads want


class Guard(Protocol):
    """Says when the memory of a buffer is not needed any more. A moment of a stream is one."""

    def wait(self) -> None:
        """Wait until then."""


class Arrays(Protocol):
    """Arrays by name, on the host and on the device."""

    def host(self, name: str) -> Tensor:
        """An array in the memory of the host."""

    def on_device(self, name: str) -> Tensor:
        """The same on the device."""


class StagingBuffer:
    """The arrays of one iteration, side by side on the host and, sent by one copy, on the device.

    On a CPU both are the same memory. On a GPU that of the host is pinned, so that the copy runs
    beside the host; it must not be written to again before the copy has been made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = self._allocate(0)
        self._on_device = self._host
        self._used = 0  # bytes
        self._arrays: dict[str, tuple[int, np.ndarray]] = {}  # where each begins, and its place

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write arrays, in place of those from before."""
        starts = []
        end = 0
        for array in arrays.values():
            starts.append(end)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._used = end
        if end > len(self._host):
            self._host = self._allocate(end)
        memory = self._host.numpy()
        self._arrays.clear()
        for (name, array), start in zip(arrays.items(), starts, strict=True):
            place = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            place[...] = array
            self._arrays[name] = start, place

    def upload(self) -> None:
        """Send them to the device, in the order of its work."""
        if self._device.type == "cpu":
            self._on_device = self._host
            return
        if len(self._on_device) < len(self._host) or self._on_device is self._host:
            self._on_device = torch.empty_like(self._host, device=self._device)
        self._on_device[: self._used].copy_(self._host[: self._used], non_blocking=True)

    def host(self, name: str) -> Tensor:
        """An array in the memory of the host."""
        return torch.from_numpy(self._arrays[name][1])

    def on_device(self, name: str) -> Tensor:
        """The same on the device, for work that follows `upload`."""
        if self._on_device is self._host:
            return self.host(name)
        start, array = self._arrays[name]
        part = self._on_device[start : start + array.nbytes]
        return part.view(_DTYPES[array.dtype]).view(array.shape)

    def _allocate(self, size: int) -> Tensor:
        """Room for `size` bytes and some more: the next iterations need a little more each."""
        rounded = 1 << max(size - 1, 4095).bit_length()
        return torch.empty(rounded, dtype=torch.uint8, pin_memory=self._device.type == "cuda")


_DTYPES = {
    np.dtype(name): getattr(torch, name) for name in ("bool", "int32", "int64", "float32", "uint8")
}


class FixedArrays:
    """Arrays that stay where they are on the device, whichever buffer their numbers come from.

    Args:
        buffer: Which has been sent, with arrays as large as any that will be taken.
        names: Of those that stay.
    """

    def __init__(self, buffer: StagingBuffer, names: Sequence[str]) -> None:
        self._arrays = {name: buffer.on_device(name).clone() for name in names}
        self._buffer = buffer

    def take(self, buffer: StagingBuffer) -> None:
        """Copy the numbers of a buffer, in the order of the device's work after its `upload`.

        Of a table they may be fewer columns; what is in the others stays.

        Raises:
            RuntimeError: An array has another shape.
        """
        for name, fixed in self._arrays.items():
            array = buffer.on_device(name)
            place = fixed[:, : array.shape[1]] if fixed.ndim == 2 else fixed
            if array.shape != place.shape:
                raise RuntimeError(
                    f"array {name} is {list(array.shape)}; expected at most {list(fixed.shape)}, "
                    f"which was the first one's shape, and as many rows"
                )
            if array.numel():
                place.copy_(array)
        self._buffer = buffer

    def host(self, name: str) -> Tensor:
        """An array that was taken last, in the memory of the host."""
        return self._buffer.host(name)

    def on_device(self, name: str) -> Tensor:
        """An array where it stays."""
        return self._arrays[name]


class StagingRing:
    """Buffers that iterations take in turn, each guarded until what it was used for is over.

    Args:
        depth: How many there are. With one more than iterations are in flight, nobody waits.
        device: Where the arrays go.
    """

    def __init__(self, depth: int, device: torch.device) -> None:
        self._buffers = [StagingBuffer(device) for _ in range(depth)]
        self._guards: list[Guard | None] = [None] * depth
        self._next = 0

    def acquire(self) -> StagingBuffer:
        """The buffer whose turn it is, once it may be written to."""
        guard = self._guards[self._next]
        if guard is not None:
            guard.wait()
            self._guards[self._next] = None
        return self._buffers[self._next]

    def release(self, guard: Guard) -> None:
        """Keep the buffer acquired last for what `guard` guards; the next one's turn comes."""
        self._guards[self._next] = guard
        self._next = (self._next + 1) % len(self._buffers)
