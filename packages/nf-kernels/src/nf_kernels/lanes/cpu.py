"""Lanes of a CPU: native threads, each pinned to a core."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from nf_kernels.lanes.kept_arguments import KeptArguments
from nf_kernels.lanes.lane import Event, Lane, grant
from nf_kernels.native import native_module, native_status, num_threads


class _Current(threading.local):
    """The lanes that a thread has entered, the last one last; None where it has left them."""

    lanes: tuple[CpuLane | None, ...] = ()


_current = _Current()


def current_lane() -> CpuLane | None:
    """The lane that this thread's operations go to."""
    lanes = _current.lanes
    return lanes[-1] if lanes else None


@contextlib.contextmanager
def outside_of_lanes() -> Iterator[None]:
    """Send this thread's operations to no lane."""
    _enter(None)
    try:
        yield
    finally:
        _leave()


def _enter(lane: CpuLane | None) -> None:
    _set_native_current(lane)
    _current.lanes = (*_current.lanes, lane)


def _leave() -> None:
    _current.lanes = _current.lanes[:-1]
    _set_native_current(current_lane())


def _set_native_current(lane: CpuLane | None) -> None:
    module = native_module()
    if module is not None:
        module.set_current_lane(lane.native if lane else None)


class CpuEvent:
    """A point in the order of a lane of a CPU; its time is that of the steady clock."""

    def __init__(self, native: Any) -> None:
        self.native = native

    def done(self) -> bool:
        """As `Event.done`."""
        return bool(self.native.done())

    def wait(self) -> None:
        """As `Event.wait`."""
        self.native.wait()

    @property
    def failed(self) -> bool:
        """Whether something had failed on the lane before it came to this, which is done."""
        return bool(self.native.failed())

    def seconds_since(self, earlier: Event) -> float:
        """As `Event.seconds_since`."""
        times = [_native_event(event).time() for event in (earlier, self)]
        if not all(times):
            raise ValueError("an event is not done yet; wait for it first")
        return float(times[1] - times[0]) * 1e-9


def _native_event(event: Event) -> Any:
    if not isinstance(event, CpuEvent):
        raise ValueError(f"event is a {type(event).__name__}; expected one of a lane of a CPU")
    return event.native


class CpuLane:
    """A `Lane` of a CPU: native threads, without the GIL."""

    def __init__(
        self, cores: tuple[int, ...], *, share: float, exclusive: bool, threads: int | None = None
    ) -> None:
        """Start the threads.

        Args:
            cores: Numbers of the cores, as the operating system counts them.
            share: Their part of the cores that this process may use.
            exclusive: Whether no other lane has any of them.
            threads: How many threads, which the operating system moves between the cores; None pins
                one to each core.

        Raises:
            RuntimeError: A core cannot be had.
        """
        module = native_module()
        if module is None:
            raise RuntimeError(f"lanes of a CPU need the native kernels: {native_status().reason}")
        self.units = cores
        self.share = share
        self.exclusive = exclusive
        self._native: Any = (
            module.Lane(list(cores)) if threads is None else module.Lane.of_threads(threads)
        )
        self._kept = KeptArguments()
        # What is queued may call Python, which a process that ends has no more.
        self._at_exit = weakref.finalize(self, _finish, self._native)

    def __enter__(self) -> Self:
        """As `Lane`."""
        _enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As `Lane`."""
        _leave()

    def record(self) -> CpuEvent:
        """As `Lane.record`."""
        return CpuEvent(self.native.record())

    def wait(self, event: Event) -> None:
        """As `Lane.wait`."""
        self.native.wait(_native_event(event))

    def synchronize(self) -> None:
        """As `Lane.synchronize`."""
        try:
            self.native.synchronize()
        finally:
            self._kept.clear()

    def call(self, function: Callable[[], object]) -> None:
        """Queue a call of a Python function, on a thread of the lane, in its turn.

        While it runs it holds the GIL, and what it raises is the lane's error.
        """
        self.native.call(function)

    @property
    def error(self) -> str:
        """What has failed, if something has by now; until `synchronize` nothing else is run."""
        return str(self.native.error())

    def close(self) -> None:
        """As `Lane.close`; may be called twice, but not inside of `with`.

        Raises:
            RuntimeError: This thread's operations still go to the lane.
        """
        if self in _current.lanes:
            raise RuntimeError("the lane is closed inside of its own `with`; close it after")
        self._at_exit.detach()
        self._native = None  # its end waits for what is queued
        self._kept.clear()

    def keep(self, arguments: Mapping[str, Any], *, until: CpuEvent | None = None) -> None:
        """Hold the arguments of a queued operation until the lane is through with it.

        Args:
            arguments: What is held.
            until: An event that was recorded after the operation; None lets the lane record one now
                and then.
        """
        if until is None:
            self._kept.add(arguments, self)
        else:
            self._kept.add_until(arguments, until)

    @property
    def native(self) -> Any:
        """The extension's lane.

        Raises:
            RuntimeError: The lane is closed.
        """
        if self._native is None:
            raise RuntimeError("the lane is closed; make a new one with lanes.partition")
        return self._native


def _finish(native: Any) -> None:
    """Wait for what a lane has queued."""
    with contextlib.suppress(ValueError):
        native.synchronize()


def undivided_cpu() -> CpuLane:
    """One lane with the threads that operations run on outside of lanes (`num_threads`).

    They go wherever the operating system puts them, beside other threads of the process.
    """
    return CpuLane(tuple(_cores()), share=1.0, exclusive=True, threads=num_threads())


def partition_cpu(shares: list[float], *, exclusive: bool) -> list[Lane]:
    """Lanes on the cores that this process may use."""
    cores = _cores()
    granted = grant(cores, shares)
    if not exclusive:
        granted = [tuple(cores)] * len(shares)
    owners = [core for units in granted for core in units]
    return [
        CpuLane(
            units,
            share=len(units) / len(cores),
            exclusive=all(owners.count(core) == 1 for core in units),
        )
        for units in granted
    ]


def _cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
