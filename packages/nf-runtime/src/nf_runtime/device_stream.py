"""The order of a device's work, beside the thread that gives it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import torch

from nf_kernels import lanes


class Moment(Protocol):
    """A place in a stream's order."""

    def wait(self) -> None:
        """Block until the device has got there."""

    def check(self) -> None:
        """Raise what has failed before this; the device has got there.

        Raises:
            Exception: What failed. What comes behind is not done then, until `synchronize`.
        """

    def nanoseconds_since(self, earlier: Moment) -> int:
        """Time between an earlier moment of any stream of the device and this one, both timed."""


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

    def record(self, *, timed: bool = False) -> Moment:
        """The place behind all that was given so far.

        Args:
            timed: Whether its time will be asked for.
        """

    def wait(self, moment: Moment) -> None:
        """Let what is given from now on come behind a moment of another stream of the device."""

    def synchronize(self) -> None:
        """Wait for everything; what has failed is forgotten."""

    def close(self) -> None:
        """End, after what was given."""


class _Now:
    """The moment at which all work that was given is done."""

    def __init__(self) -> None:
        self._time = time.perf_counter_ns()

    def wait(self) -> None:
        """There is nothing to wait for."""

    def nanoseconds_since(self, earlier: Moment) -> int:
        """As `Moment`."""
        if not isinstance(earlier, _Now):
            raise ValueError("the moments are of different devices")
        return self._time - earlier._time

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

    def record(self, *, timed: bool = False) -> Moment:
        """Now."""
        return _Now()

    def wait(self, moment: Moment) -> None:
        """All moments have passed."""

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

    def record(self, *, timed: bool = False) -> Moment:
        """An event of the stream."""
        event = torch.cuda.Event(enable_timing=timed)
        event.record(torch.cuda.current_stream(self._device))
        return _CudaMoment(event)

    def wait(self, moment: Moment) -> None:
        """Let the stream wait for an event."""
        torch.cuda.current_stream(self._device).wait_event(_cuda_event(moment))

    def synchronize(self) -> None:
        """Wait for the stream."""
        torch.cuda.current_stream(self._device).synchronize()


class _CudaMoment:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        """Block until the stream has got there."""
        self.event.synchronize()

    def check(self) -> None:
        """CUDA raises what fails on a device when it is waited for."""

    def nanoseconds_since(self, earlier: Moment) -> int:
        """As `Moment`."""
        milliseconds: float = _cuda_event(earlier).elapsed_time(self.event)
        return round(milliseconds * 1e6)


def _cuda_event(moment: Moment) -> torch.cuda.Event:
    if not isinstance(moment, _CudaMoment):
        raise ValueError("the moment is not of a stream of a CUDA device")
    return moment.event


class CudaLaneStream(InlineStream):
    """A lane of a CUDA device: a stream whose kernels have a share of it.

    Args:
        device: Which.
        lane: The lane.
    """

    def __init__(self, device: torch.device, lane: lanes.Lane) -> None:
        self._lane = lane
        self._stream = CudaStream(device)

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
        """Call it now, for the lane."""
        with self:
            function()

    def record(self, *, timed: bool = False) -> Moment:
        """An event of the lane's stream."""
        with self:
            return self._stream.record(timed=timed)

    def wait(self, moment: Moment) -> None:
        """Let the lane's stream wait for an event."""
        with self:
            self._stream.wait(moment)

    def synchronize(self) -> None:
        """Wait for the lane."""
        self._lane.synchronize()

    def close(self) -> None:
        """Give the units back."""
        self._lane.close()


class LaneStream:
    """A CPU whose kernels run on threads of their own, without the GIL: a lane of all of it.

    Args:
        lane: The lane.

    Attributes:
        lane: See above.
    """

    def __init__(self, lane: lanes.CpuLane) -> None:
        self.lane = lane
        self._error: BaseException | None = None  # of a function that was called

    def __enter__(self) -> Self:
        """As `DeviceStream`."""
        self.lane.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As `DeviceStream`."""
        self.lane.__exit__(kind, error, trace)

    def call(self, function: Callable[[], object]) -> None:
        """Have it called by a thread of the lane."""
        self.lane.call(partial(self.attend, function))

    def attend(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function on a thread of the lane, and remember what it raises."""
        try:
            with torch.inference_mode():
                function(*arguments)
        except BaseException as error:
            self._error = error
            raise

    def record(self, *, timed: bool = False) -> Moment:
        """An event of the lane."""
        return _LaneMoment(self, self.lane.record())

    def wait(self, moment: Moment) -> None:
        """Let the lane wait for an event of another one."""
        self.lane.wait(_lane_event(moment))

    def synchronize(self) -> None:
        """Wait for the lane."""
        with contextlib.suppress(ValueError):
            self.lane.synchronize()
        self._error = None  # until here, everything behind what has failed was dropped

    def close(self) -> None:
        """End the threads."""
        self.lane.close()

    def failure(self) -> BaseException:
        """What has failed."""
        return self._error or ValueError(self.lane.error)


class _LaneMoment:
    def __init__(self, stream: LaneStream, event: lanes.CpuEvent) -> None:
        self._stream = stream
        self.event = event

    def wait(self) -> None:
        """Block until the lane has got there."""
        self.event.wait()

    def check(self) -> None:
        """Raise what has failed before this; not what has behind it."""
        if self.event.failed:
            raise self._stream.failure()

    def nanoseconds_since(self, earlier: Moment) -> int:
        """As `Moment`."""
        return round(self.event.seconds_since(_lane_event(earlier)) * 1e9)


def _lane_event(moment: Moment) -> lanes.CpuEvent:
    if not isinstance(moment, _LaneMoment):
        raise ValueError("the moment is not of a lane of a CPU")
    return moment.event
