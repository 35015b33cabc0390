"""A lane of a CUDA device: a stream, the SMs it may use, and its events."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from nf_kernels.lanes.cuda.runtime import Runtime
from nf_kernels.lanes.kept_arguments import KeptArguments
from nf_kernels.lanes.lane import Event

_current = threading.local()


def current_lane() -> CudaLane | None:
    """The lane that this thread's operations go to."""
    entered: list[tuple[CudaLane, Any]] = getattr(_current, "lanes", [])
    return entered[-1][0] if entered else None


class CudaEvent:
    """A point in the order of a lane; its time is the device's."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        """As `Event.done`."""
        return bool(self.event.query())

    def wait(self) -> None:
        """As `Event.wait`."""
        self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        """As `Event.seconds_since`."""
        if not (earlier.done() and self.done()):
            raise ValueError("an event is not done yet; wait for it first")
        return float(_cuda_event(earlier).elapsed_time(self.event)) * 1e-3


def _cuda_event(event: Event) -> Any:
    if not isinstance(event, CudaEvent):
        raise ValueError(f"event is a {type(event).__name__}; expected one of a lane of CUDA")
    return event.event


class GreenContext:
    """A green context that some lanes share, destroyed with the last of them.

    Attributes:
        handle: As `Runtime.create_context` gives it.
        lanes: How many are in it.
    """

    def __init__(self, runtime: Runtime, handle: Any) -> None:
        """Take over a context that no lane is in yet.

        Args:
            runtime: What torch and the driver do.
            handle: See above.
        """
        self._runtime = runtime
        self.handle = handle
        self.lanes = 0

    def leave(self) -> None:
        """Let a lane go whose stream is destroyed; with the last one goes the context.

        Raises:
            RuntimeError: The driver refuses.
        """
        self.lanes -= 1
        if not self.lanes:
            self._runtime.destroy_context(self.handle)


class CudaLane:
    """A `Lane` of a CUDA device.

    Entered from outside of lanes, it first waits on the device for what the stream before has
    queued, so that tensors that were just made can be used.

    Attributes:
        units: As `Lane`; SMs are counted in the order in which the driver has grouped them, which
            are not their hardware numbers.
        share: As `Lane`.
        exclusive: As `Lane`.
        sm_count: SMs its kernels may use.
        sm_cap: The same for a capped lane, whose kernels are told; else 0.
    """

    def __init__(
        self,
        runtime: Runtime,
        device: int,
        *,
        units: tuple[int, ...],
        sm_count: int,
        device_sms: int,
        exclusive: bool,
        capped: bool = False,
        priority: int = 0,
        context: GreenContext | None = None,
    ) -> None:
        """Make the stream.

        Args:
            runtime: What torch and the driver do.
            device: Its number.
            units: See above.
            sm_count: See above.
            device_sms: SMs of the device.
            exclusive: See above.
            capped: Whether kernels are told `sm_count`.
            priority: Of the stream.
            context: The green context it is in, if it is.

        Raises:
            RuntimeError: The driver refuses. The context is left, as by `close`.
        """
        self.units = units
        self.sm_count = sm_count
        self.sm_cap = sm_count if capped else 0
        self.share = sm_count / device_sms
        self.exclusive = exclusive
        self._runtime = runtime
        self._device = device
        self._context = context
        if context is not None:
            context.lanes += 1
        try:
            self._stream: Any = runtime.create_stream(
                device, priority, context.handle if context is not None else None
            )
        except BaseException:
            if context is not None:
                context.leave()
            raise
        self._kept = KeptArguments()

    @property
    def stream(self) -> Any:
        """The torch stream, for kernels that are not operations of `nf_kernels.ops`.

        Raises:
            RuntimeError: The lane is closed.
        """
        if self._stream is None:
            raise RuntimeError("the lane is closed; make a new one with lanes.partition")
        return self._stream

    def __enter__(self) -> Self:
        """As `Lane`."""
        stream = self.stream
        entered: list[tuple[CudaLane, Any]] = _current.__dict__.setdefault("lanes", [])
        if not entered:
            stream.wait_stream(self._runtime.current_stream(self._device))
        use = self._runtime.use(stream)
        use.__enter__()
        entered.append((self, use))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As `Lane`."""
        _, use = _current.lanes.pop()
        use.__exit__(kind, error, trace)

    def record(self) -> CudaEvent:
        """As `Lane.record`."""
        event = self._runtime.create_event()
        event.record(self.stream)
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        """As `Lane.wait`."""
        self.stream.wait_event(_cuda_event(event))

    def synchronize(self) -> None:
        """As `Lane.synchronize`, but that nothing tells of an index out of range.

        Some operations make it an error of the device, from which a process does not recover.

        Raises:
            RuntimeError: The device has failed.
        """
        try:
            self.stream.synchronize()
        finally:
            self._kept.clear()

    def close(self) -> None:
        """As `Lane.close`; may be called twice, but not inside of `with`.

        Raises:
            RuntimeError: This thread's operations still go to the lane.
        """
        if any(lane is self for lane, _ in getattr(_current, "lanes", [])):
            raise RuntimeError("the lane is closed inside of its own `with`; close it after")
        if self._stream is None:
            return
        self.synchronize()
        stream, self._stream = self._stream, None
        self._runtime.destroy_stream(stream, self._context and self._context.handle)
        if self._context is not None:
            self._context.leave()

    def keep(self, arguments: Mapping[str, Any]) -> None:
        """Hold the arguments of a queued operation until the lane is through with it.

        Those of a captured one are for the owner of the graph to hold.
        """
        if not self._runtime.is_capturing():  # an event of a capture tells nothing of the device
            self._kept.add(arguments, self)
