"""What an executor asks of a device: streams of all of it and of its shares, and graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch

from nf_kernels import lanes, native_status
from nf_kernels.ops import CPU, OperationSet
from nf_runtime.device_graph import CudaGraphCapture, DeviceGraph
from nf_runtime.device_stream import (
    CudaLaneStream,
    CudaStream,
    DeviceStream,
    InlineStream,
    LaneStream,
)
from nf_runtime.pipeline.plan import Partition, Plan

_log = logging.getLogger(__name__)


class DeviceApi(Protocol):
    """A device: one stream for all of it, and streams for the lanes of plans.

    Attributes:
        stream: Of the whole device.
    """

    stream: DeviceStream

    def streams(self, plan: Plan) -> Sequence[DeviceStream]:
        """A stream for each lane of a plan (`Plan.lane_names`), the whole device's first.

        Those of plans that divide the device alike are the same.
        """

    def capture(self, work: Callable[[], object]) -> DeviceGraph:
        """Do some work, and record it, to be done again at one call.

        Args:
            work: Gives it to `stream`, and to others between that one's beginning and end. It is
                called more than once.

        Raises:
            RuntimeError: It cannot be recorded, or the device records nothing.
        """

    def synchronize(self) -> None:
        """Wait for all streams; what has failed is forgotten."""

    def release(self) -> None:
        """Give back what `streams` has divided, after what was given to it."""

    def close(self) -> None:
        """End, after what was given."""


class InlineDevice:
    """A device that does work as it is given: all lanes of a plan are one."""

    def __init__(self) -> None:
        self.stream: DeviceStream = InlineStream()

    def streams(self, plan: Plan) -> Sequence[DeviceStream]:
        """The same for all."""
        return [self.stream] * len(plan.lane_names)

    def capture(self, work: Callable[[], object]) -> DeviceGraph:
        """Nothing is recorded here."""
        raise RuntimeError("plain torch on a CPU has no device graphs")

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def release(self) -> None:
        """Nothing is divided."""

    def close(self) -> None:
        """There is nothing to end."""


class _DividedDevice:
    """A device that lanes divide; each division is kept for the plans that ask for it again."""

    _mechanisms: Mapping[Partition, str]  # of `lanes.partition`; the others are its default

    def __init__(self, device: torch.device, stream: DeviceStream) -> None:
        self.stream = stream
        self._device = device
        self._divisions: dict[tuple[Partition, tuple[float, ...]], list[DeviceStream]] = {}

    def streams(self, plan: Plan) -> Sequence[DeviceStream]:
        """As `DeviceApi`."""
        shares = tuple(lane.share for lane in plan.lanes)
        if not shares:
            return [self.stream]
        key = plan.partition, shares
        if key not in self._divisions:
            mechanism = self._mechanisms.get(plan.partition)
            made = lanes.partition(self._device, shares, mechanism=mechanism)
            for lane, asked in zip(made, plan.lanes, strict=True):
                exclusive = lane.exclusive or plan.partition is Partition.SHARED
                _log.info(
                    "plan %s: lane %s has units %s of %s%s",
                    plan.name,
                    asked.name,
                    ",".join(map(str, lane.units)),
                    self._device,
                    "" if exclusive else ", which other lanes have as well",
                )
            self._divisions[key] = [self._stream_of(lane) for lane in made]
        return [self.stream, *self._divisions[key]]

    def synchronize(self) -> None:
        """As `DeviceApi`."""
        for streams in self._divisions.values():
            for stream in streams:
                stream.synchronize()
        self.stream.synchronize()

    def release(self) -> None:
        """As `DeviceApi`."""
        divisions, self._divisions = self._divisions, {}
        for streams in divisions.values():
            for stream in streams:
                stream.close()

    def close(self) -> None:
        """As `DeviceApi`."""
        self.release()
        self.stream.close()

    def _stream_of(self, lane: lanes.Lane) -> DeviceStream:
        raise NotImplementedError


class CpuDevice(_DividedDevice):
    """A CPU whose kernels run on lanes: native threads, without the GIL."""

    _mechanisms = MappingProxyType({Partition.SHARED: "shared"})

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), LaneStream(lanes.undivided_cpu()))

    def capture(self, work: Callable[[], object]) -> DeviceGraph:
        """Nothing is recorded here: on a CPU, `ProgramRunner` does without."""
        raise RuntimeError("a CPU has no device graphs")

    def _stream_of(self, lane: lanes.Lane) -> DeviceStream:
        if not isinstance(lane, lanes.CpuLane):
            raise TypeError(f"lane is a {type(lane).__name__}; expected one of a CPU")
        return LaneStream(lane)


class CudaDevice(_DividedDevice):
    """A CUDA device: torch's current stream, and lanes of green contexts, or beside each other.

    Args:
        device: Which.
    """

    _mechanisms = MappingProxyType({Partition.SHARED: "shared", Partition.CAPPED: "capped"})

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, CudaStream(device))
        self._capture: CudaGraphCapture | None = None

    def capture(self, work: Callable[[], object]) -> DeviceGraph:
        """A CUDA graph."""
        if self._capture is None:
            self._capture = CudaGraphCapture(self._device)
        return self._capture.capture(work)

    def _stream_of(self, lane: lanes.Lane) -> DeviceStream:
        return CudaLaneStream(self._device, lane)


def make_device_api(device: torch.device, operations: OperationSet) -> DeviceApi:
    """A device that nothing else runs on.

    Args:
        device: Where the work goes.
        operations: That will be given to it.
    """
    if device.type == "cuda":
        return CudaDevice(device)
    if operations is CPU and native_status().available:
        return CpuDevice()
    return InlineDevice()
