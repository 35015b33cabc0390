"""What the operations of a CUDA device keep for each stream: memory, and FlashInfer's wrappers."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nf_kernels.lanes.cuda import CudaLane, current_lane


class _Event(Protocol):
    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


@dataclass(slots=True)
class Wrapper:
    """A FlashInfer wrapper and its last plan.

    Attributes:
        flashinfer: The wrapper.
        staged: When the device has read what the plan staged on the host.
        rows: Queries that it is for.
        last_page: The highest page that it uses; -1 where the host does not know the pages.
        num_pages: Pages of the cache that it is for.
        in_graph: Whether a device graph reads its plan.
    """

    flashinfer: Any
    staged: _Event | None = None
    rows: int = 0
    last_page: int = -1
    num_pages: int = 0
    in_graph: bool = False


@dataclass(slots=True)
class StreamState:
    """Memory of the operations that run one after the other on a stream.

    Attributes:
        idle: Wrappers that no announced batch uses, by backend.
        buffers: Memory by name, grown to the largest request.
        whole_caches: Index arrays of all pages, by their number and size.
        in_graphs: Buffers that a CUDA graph was captured with, by address.
    """

    idle: dict[str, list[Wrapper]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    whole_caches: dict[tuple[int, int], tuple[Tensor, ...]] = field(default_factory=dict)
    in_graphs: dict[int, Tensor] = field(default_factory=dict)

    def buffer(self, name: str, size: int, device: torch.device) -> Tensor:
        """Memory of at least `size` bytes, zero when it is new: uint8 [size].

        It moves when it grows, and its old place is given to others, unless a CUDA graph was
        captured with it: that goes on to use the old place. What a capture needs has to be there
        before, so run once what is captured.
        """
        kept = self.buffers.get(name)
        if kept is None or kept.numel() < size:
            kept = self.buffers[name] = torch.zeros(size, dtype=torch.uint8, device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.in_graphs[kept.data_ptr()] = kept
        return kept[:size]

    def whole_cache(
        self, num_pages: int, page_size: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        """A request's pages, first page and end, and length of the last: all that there are."""
        kept = self.whole_caches.get((num_pages, page_size))
        if kept is None:
            numbers = ([*range(num_pages)], [0, num_pages], [page_size])
            kept = tuple(torch.tensor(n, dtype=torch.int32, device=device) for n in numbers)
            self.whole_caches[num_pages, page_size] = kept
        return kept


class StreamStates:
    """The state of each stream; that of a lane goes with the lane. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_lanes: weakref.WeakKeyDictionary[CudaLane, StreamState] = (
            weakref.WeakKeyDictionary()
        )
        self._of_streams: dict[tuple[torch.device, int], StreamState] = {}

    def current(self, device: torch.device) -> StreamState:
        """That of the stream which this thread's operations on the device go to."""
        lane = current_lane()
        stream = 0
        if lane is None and device.type == "cuda":
            stream = torch.cuda.current_stream(device).cuda_stream
        with self._lock:
            if lane is not None:
                state = self._of_lanes.get(lane)
                if state is None:
                    state = self._of_lanes[lane] = StreamState()
                return state
            state = self._of_streams.get((device, stream))
            if state is None:
                state = self._of_streams[device, stream] = StreamState()
            return state
