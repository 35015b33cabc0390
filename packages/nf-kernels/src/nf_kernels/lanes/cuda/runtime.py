"""What lanes of a CUDA device ask of torch and of the driver."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


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

    def is_capturing(self) -> bool:
        """Whether this thread's work goes to a CUDA graph."""


class CudaRuntime:
    """`Runtime` by torch and cuda-bindings; the latter is looked for when it is needed.

    Streams of the whole device are torch's, which has 32 for each priority and gives them out in
    turn: with more, and with those that others took in between, lanes share a stream and run one
    after the other.
    """

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

    def is_capturing(self) -> bool:
        """As `Runtime.is_capturing`."""
        return torch.cuda.is_current_stream_capturing()


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
