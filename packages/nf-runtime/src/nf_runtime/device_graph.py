"""Work that a device records once, and does again at one call: CUDA graphs.

Not yet run on a device; docs/gpu-status.md says what is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class DeviceGraph(Protocol):
    """Recorded work. What it reads and writes stays where it was; what is there may change."""

    def launch(self) -> None:
        """Give it to the device, behind what was given before."""


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def launch(self) -> None:
        """As `DeviceGraph.launch`, in the order of the current stream."""
        self._graph.replay()


class CudaGraphCapture:
    """Makes graphs that are launched one after the other, and so share memory.

    Work on lanes of green contexts stays on their SMs: their streams are part of the capture by the
    events that order them.

    Args:
        device: Which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # One stream for all: what operations keep for a stream is there when the capture begins.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._failure: RuntimeError | None = None

    def capture(self, work: Callable[[], object]) -> DeviceGraph:
        """Do some work, and record it.

        Args:
            work: Gives it to the current stream, and to others that wait for it and that it waits
                for in the end. It is called three times: what is made by a first call cannot be
                captured, nor what waits for the device, which a second call finds out.

        Raises:
            RuntimeError: Some of it cannot be captured, or a capture has failed before.
        """
        if self._failure is not None:
            raise RuntimeError(f"an earlier capture has failed: {self._failure}")
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()
                with _refused_waits():
                    work()
            return _CudaGraph(self._record(work, current))
        finally:
            current.wait_stream(self._stream)

    def _record(
        self, work: Callable[[], object], current: torch.cuda.Stream
    ) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on to copy KV.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        except RuntimeError as error:
            # torch leaves its stream, and its allocator the pool, only where a capture succeeds.
            torch.cuda.set_stream(current)
            # What ended the capture tells more than that it ended.
            cause = error.__context__
            self._failure = cause if isinstance(cause, RuntimeError) else error
            raise self._failure from error
        return graph


@contextmanager
def _refused_waits() -> Iterator[None]:
    """Have what waits for the device raise a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
