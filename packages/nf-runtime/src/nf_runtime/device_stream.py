"""The order of a device's work, beside the thread that gives it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import torch

from nf_kernels import lanes, native_status
from nf_kernels.ops import CPU, OperationSet


class Moment(Protocol):
    """A place in a stream's order."""

    def wait(self) -> None:
        """Block until the device has got there."""

    def check(self) -> None:
        """Raise what has failed before this; the device has got there.

        Raises:
            Exception: What failed. What comes behind is not done then, until `synchronize`.
        """


class DeviceStream(Protocol):
    """Work on a device, done in the order in which it is given.

    Operations that are called inside of `with stream:` belong to it. They may return before they
    are done.
    """

    def __enter__(self) -> Self:
        """Give operations to the stream."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give them to whoever got them before."""

    def call(self, function: Callable[[], object]) -> None:
        """Have a function called in its turn. It works on the device with torch, or looks on.

        It may run at once, if all that it does there keeps its turn, or on another thread.
        """

    def record(self) -> Moment:
        """The place behind all that was given so far."""

    def synchronize(self) -> None:
        """Wait for everything; what has failed is forgotten."""

    def close(self) -> None:
        """End, after what was given."""


class _Now:
    """The moment at which all work that was given is done."""

    def wait(self) -> None:
        """There is nothing to wait for."""

    def check(self) -> None:
        """What fails is raised by the call that gives it."""


class InlineStream:
    """Work that is done, or has its place, when the call that gives it returns: plain torch."""

    def __enter__(self) -> Self:
        """As `DeviceStream`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As `DeviceStream`."""

    def call(self, function: Callable[[], object]) -> None:
        """Call it now."""
        function()

    def record(self) -> Moment:
        """Now."""
        return _Now()

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def close(self) -> None:
        """There is nothing to end."""


class CudaStream(InlineStream):
    """The current stream of a CUDA device: to call what launches work is to keep its turn.

    Args:
        device: Which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self) -> Moment:
        """An event of the stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return _CudaMoment(event)

    def synchronize(self) -> None:
        """Wait for the stream."""
        torch.cuda.current_stream(self._device).synchronize()


class _CudaMoment:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """Block until the stream has got there."""
        self._event.synchronize()

    def check(self) -> None:
        """CUDA raises what fails on a device when it is waited for."""


class LaneStream:
    """A CPU whose kernels run on threads of their own, without the GIL: a lane of all of it.

    Args:
        lane: The lane.
    """

    def __init__(self, lane: lanes.CpuLane) -> None:
        self._lane = lane
        self._error: BaseException | None = None  # of a function that was called

    def __enter__(self) -> Self:
        """As `DeviceStream`."""
        self._lane.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As `DeviceStream`."""
        self._lane.__exit__(kind, error, trace)

    def call(self, function: Callable[[], object]) -> None:
        """Have it called by a thread of the lane."""

        def run() -> None:
            try:
                with torch.inference_mode():
                    function()
            except BaseException as error:
                self._error = error
                raise

        self._lane.call(run)

    def record(self) -> Moment:
        """An event of the lane."""
        return _LaneMoment(self, self._lane.record())

    def synchronize(self) -> None:
        """Wait for the lane."""
        with contextlib.suppress(ValueError):
            self._lane.synchronize()
        self._error = None  # until here, everything behind what has failed was dropped

    def close(self) -> None:
        """End the threads."""
        self._lane.close()

    def failure(self) -> BaseException:
        """What has failed."""
        return self._error or ValueError(self._lane.error)


class _LaneMoment:
    def __init__(self, stream: LaneStream, event: lanes.CpuEvent) -> None:
        self._stream = stream
        self._event = event

    def wait(self) -> None:
        """Block until the lane has got there."""
        self._event.wait()

    def check(self) -> None:
        """Raise what has failed before this; not what has behind it."""
        if self._event.failed:
            raise self._stream.failure()


def make_stream(device: torch.device, operations: OperationSet) -> DeviceStream:
    """The stream of a device that nothing else runs on.

    Args:
        device: Where the work goes.
        operations: That will be given to it.
    """
    if device.type == "cuda":
        return CudaStream(device)
    if operations is CPU and native_status().available:
        return LaneStream(lanes.undivided_cpu())
    return InlineStream()
