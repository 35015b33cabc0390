"""Lanes of a CUDA device: streams on SMs of their own, of capped kernels, or side by side.

Not yet run on a device; docs/gpu-status.md says what is. Three mechanisms:

- `green_contexts`: the driver divides the SMs once into groups, and each lane's stream belongs to a
  context that has some of them. `torch.cuda.green_contexts` divides the whole device anew for each
  context, so that two of its contexts share SMs; the driver's own functions are called through
  cuda-bindings instead.
- `capped`: a stream for each lane, with a priority and a number of SMs. Kernels that can keep to a
  number (our products and copies) do; others run on all SMs. Smaller lanes have the higher
  priority: what would fill the device must not keep a small kernel out.
- `shared`: a stream for each lane, and the device divides itself.
"""

from __future__ import annotations

import importlib
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from nf_kernels.lanes.lane import Event, Lane, grant

MECHANISMS = ("green_contexts", "capped", "shared")

_KEPT_BETWEEN_EVENTS = 256

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


@dataclass(frozen=True, slots=True)
class SmGrant:
    """What a lane gets of a device that is divided into groups of SMs.

    Attributes:
        groups: Numbers of the groups.
        remainder: Whether it gets the SMs that belong to no group, too.
        units: Numbers of its SMs, counted in the order of the groups, the remainder last.
    """

    groups: tuple[int, ...]
    remainder: bool
    units: tuple[int, ...]


def grant_sms(
    *, groups: int, group_size: int, remainder: int, shares: Sequence[float]
) -> list[SmGrant]:
    """Divide groups of SMs by shares, and leave none over.

    As `lane.grant` for the groups. The remainder goes to the lane that is furthest below its
    share, and where lanes share a group, to all that do.

    Args:
        groups: Groups that the driver makes of the device.
        group_size: SMs of a group, the granularity.
        remainder: SMs in no group.
        shares: As `lane.grant`.

    Raises:
        ValueError: As `lane.grant`.
    """
    granted = grant(range(groups), shares)
    sms = groups * group_size + remainder
    missing = [
        sms * share / sum(shares) - len(numbers) * group_size
        for share, numbers in zip(shares, granted, strict=True)
    ]
    neediest = granted[missing.index(max(missing))] if remainder else ()
    return [
        SmGrant(
            groups=numbers,
            remainder=numbers == neediest,
            units=tuple(
                sm
                for number in numbers
                for sm in range(number * group_size, (number + 1) * group_size)
            )
            + (tuple(range(groups * group_size, sms)) if numbers == neediest else ()),
        )
        for numbers in granted
    ]


@dataclass(frozen=True, slots=True)
class SmGroups:
    """A device's SMs as the driver has divided them, in one call.

    Attributes:
        groups: Resources of equal size.
        group_size: SMs of each.
        remainder: The resource of what is left, or None.
        remainder_size: Its SMs.
    """

    groups: list[Any]
    group_size: int
    remainder: Any
    remainder_size: int


class Runtime(Protocol):
    """What lanes ask of torch and the driver."""

    def sm_count(self, device: int) -> int:
        """SMs of the device."""

    def divide(self, device: int) -> SmGroups:
        """Divide the SMs into the smallest groups that the driver makes."""

    def create_context(self, device: int, resources: list[Any]) -> Any:
        """A context that has these resources, of one division, alone."""

    def destroy_context(self, context: Any) -> None:
        """Destroy it; its streams are destroyed before."""

    def create_stream(self, device: int, priority: int, context: Any) -> Any:
        """A torch stream, in a context of `create_context` or, for None, in the whole device."""

    def destroy_stream(self, stream: Any, context: Any) -> None:
        """Destroy it, if torch does not."""

    def priorities(self) -> tuple[int, int]:
        """The lowest and the highest priority of a stream; the higher is the lower number."""

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Send this thread's work to the stream."""

    def current_stream(self, device: int) -> Any:
        """The stream that this thread's work goes to."""

    def create_event(self) -> Any:
        """A torch event with a time."""


class CudaRuntime:
    """`Runtime` by torch and cuda-bindings; the latter is looked for when it is needed."""

    def sm_count(self, device: int) -> int:
        """As `Runtime.sm_count`."""
        return torch.cuda.get_device_properties(device).multi_processor_count

    def divide(self, device: int) -> SmGroups:
        """As `Runtime.divide`."""
        driver = _driver()
        torch.cuda.synchronize(device)  # there is a primary context from here on
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        handle = _call("cuDeviceGet", device)
        whole = _call("cuDeviceGetDevResource", handle, kind)
        # The least that a group can have, rounded up by the driver, is its granularity.
        (smallest, *_), _, _ = _call("cuDevSmResourceSplitByCount", 1, whole, 0, 1)
        size = int(smallest.sm.smCount)
        # How many there can be depends on how the SMs are clustered; the driver says how many.
        groups, count, remainder = _call(
            "cuDevSmResourceSplitByCount", whole.sm.smCount // size, whole, 0, size
        )
        left = int(whole.sm.smCount) - int(count) * size
        return SmGroups(list(groups[:count]), size, remainder if left else None, left)

    def create_context(self, device: int, resources: list[Any]) -> Any:
        """As `Runtime.create_context`."""
        flags = _driver().CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        description = _call("cuDevResourceGenerateDesc", resources, len(resources))
        return _call("cuGreenCtxCreate", description, _call("cuDeviceGet", device), int(flags))

    def destroy_context(self, context: Any) -> None:
        """As `Runtime.destroy_context`."""
        _call("cuGreenCtxDestroy", context)

    def create_stream(self, device: int, priority: int, context: Any) -> Any:
        """As `Runtime.create_stream`."""
        if context is None:
            return torch.cuda.Stream(device, priority=priority)
        flags = int(_driver().CUstream_flags.CU_STREAM_NON_BLOCKING)
        handle = _call("cuGreenCtxStreamCreate", context, flags, priority)
        return torch.cuda.ExternalStream(int(handle), device=device)

    def destroy_stream(self, stream: Any, context: Any) -> None:
        """As `Runtime.destroy_stream`."""
        if context is not None:
            _call("cuStreamDestroy", stream.cuda_stream)

    def priorities(self) -> tuple[int, int]:
        """As `Runtime.priorities`."""
        stream: Any = torch.cuda.Stream  # whose static method is declared as another
        lowest, highest = stream.priority_range()
        return lowest, highest

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """As `Runtime.use`."""
        return torch.cuda.stream(stream)

    def current_stream(self, device: int) -> Any:
        """As `Runtime.current_stream`."""
        return torch.cuda.current_stream(device)

    def create_event(self) -> Any:
        """As `Runtime.create_event`."""
        return torch.cuda.Event(enable_timing=True)


def _driver() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise RuntimeError(
            f"lanes by green contexts need cuda-bindings ({error}); install it with: "
            f"pip install 'nf-kernels[cuda]', or choose mechanism 'capped' or 'shared'"
        ) from None


def _call(function: str, *arguments: Any) -> Any:
    """Call a function of the driver; its one result, or a tuple of several."""
    driver = _driver()
    error, *results = getattr(driver, function)(*arguments)
    if int(error):
        name = driver.cuGetErrorName(error)[1]
        text = name.decode() if isinstance(name, bytes) else f"error {int(error)}"
        raise RuntimeError(f"{function} failed: {text}")
    return results[0] if len(results) == 1 else tuple(results)


class _Context:
    """A green context that some lanes share, destroyed with the last of them."""

    def __init__(self, runtime: Runtime, handle: Any) -> None:
        self._runtime = runtime
        self.handle = handle
        self.lanes = 0

    def leave(self) -> None:
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
        context: _Context | None = None,
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
        self._stream: Any = runtime.create_stream(
            device, priority, context.handle if context is not None else None
        )
        # Arguments of what is queued: those since the last event, and those before it.
        self._recent: list[Mapping[str, Any]] = []
        self._kept: deque[tuple[CudaEvent, list[Mapping[str, Any]]]] = deque()

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
        """As `Lane.synchronize`, but that an index out of range is an error of the device.

        Raises:
            RuntimeError: The device has failed.
        """
        self.stream.synchronize()
        self._recent.clear()
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
        """Hold the arguments of a queued operation until the lane is through with it."""
        self._recent.append(arguments)
        if len(self._recent) == _KEPT_BETWEEN_EVENTS:
            self._kept.append((self.record(), self._recent))
            self._recent = []
            while self._kept and self._kept[0][0].done():
                self._kept.popleft()


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
    contexts: dict[tuple[int, ...], _Context] = {}
    lanes: list[Lane] = []
    for part in granted:
        if part.groups not in contexts:
            resources = [division.groups[number] for number in part.groups]
            if part.remainder:
                resources.append(division.remainder)
            contexts[part.groups] = _Context(runtime, runtime.create_context(device, resources))
        lanes.append(
            CudaLane(
                runtime,
                device,
                units=part.units,
                sm_count=len(part.units),
                device_sms=sms,
                exclusive=sum(part.groups == other.groups for other in granted) == 1,
                context=contexts[part.groups],
            )
        )
    return lanes
