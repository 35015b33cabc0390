"""Moves pages between a device and the host, beside the computation."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_log = logging.getLogger(__name__)

Layer = tuple[Tensor, Tensor]
"""K and V of a layer, each [num_pages, num_kv_heads, page_size, head_dim]."""


class Event(Protocol):
    """A moment that comes once."""

    @property
    def done(self) -> bool:
        """Whether it has come."""

    @property
    def failed(self) -> bool:
        """Whether it has come because what leads to it has failed; that is in the log."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it, `timeout` seconds at most; whether it has come."""


@dataclass(frozen=True, slots=True)
class Download:
    """A copy to the host that is under way.

    Attributes:
        source_read: from here on the pages on the device may be overwritten, if the computation
            holds for it (`Copier.hold`).
        done: from here on the pages on the host are complete.
    """

    source_read: Event
    done: Event


class Copier(Protocol):
    """Copies pages in the order in which it is asked, on a queue of its own.

    The *computation* is whatever else works on the device by order of the calling thread. A copy
    begins after all of it that was ordered before; what is ordered later runs beside the copy,
    unless it `hold`s for it.

    Attributes:
        download_seconds: time spent on copies to the host, so far.
        upload_seconds: time spent on copies to the device, so far.
    """

    download_seconds: float
    upload_seconds: float

    def download(
        self, layers: Sequence[Layer], pages: Sequence[int], targets: Sequence[np.ndarray]
    ) -> Download:
        """Copy pages of some layers to the host.

        Args:
            layers: of the device.
            pages: numbers of n pages.
            targets: for every page bytes, uint8 [len(layers), 2, bytes of K, and of V, of a page in
                a layer].
        """

    def upload(
        self, layers: Sequence[Layer], pages: Sequence[int], sources: Sequence[np.ndarray]
    ) -> Event:
        """Copy pages of some layers to the device; arguments as for `download`."""

    def duplicate(self, layers: Sequence[Layer], source: int, target: int) -> None:
        """Copy a page to another on the device, as a part of the computation."""

    def hold(self, event: Event) -> None:
        """Let the computation that is ordered from here on wait for an event of this copier."""

    def close(self) -> None:
        """Finish what was asked for and end."""


class TaskEvent:
    """The end of a task of a `CopyThread`."""

    def __init__(self) -> None:
        self._flag = threading.Event()
        self.failed = False

    @property
    def done(self) -> bool:
        """Whether the task has ended."""
        return self._flag.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end."""
        return self._flag.wait(timeout)

    def finish(self, *, failed: bool) -> None:
        """Say how the task ended."""
        self.failed = failed
        self._flag.set()


class CopyThread:
    """Runs tasks one after another beside the thread that orders them."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[], None], TaskEvent] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="nf-kv-copy", daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], None]) -> TaskEvent:
        """Queue a task."""
        event = TaskEvent()
        self._tasks.put((task, event))
        return event

    def run_now(self, task: Callable[[], None]) -> TaskEvent:
        """Run a task on the calling thread, before what is queued."""
        event = TaskEvent()
        _finish(task, event)
        return event

    def close(self) -> None:
        """Run what is queued, then end."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            _finish(*item)


def _finish(task: Callable[[], None], event: TaskEvent) -> None:
    try:
        task()
    except Exception:
        _log.exception("A copy of KV pages failed; they count as not copied")
        event.finish(failed=True)
    else:
        event.finish(failed=False)


class CpuCopier:
    """Copies in the memory of the host, on a thread.

    The computation may run on another thread than the one that asks for copies, and is not ordered
    against them by that: a page that is copied down is complete, because only committed tokens are
    asked for, and is not written to before the copy is done, because whoever writes `hold`s.

    Args:
        inline_bytes: a download of no more bytes is done by the calling thread, at once: to wake
            another one, which takes a core from the computation, would cost more. It needs no place
            in the queue, because a page is neither given away nor read before its copies are done.
    """

    def __init__(self, inline_bytes: int = 256 << 10) -> None:
        self._inline_bytes = inline_bytes
        self._thread = CopyThread()
        self.download_seconds = 0.0
        self.upload_seconds = 0.0

    def download(
        self, layers: Sequence[Layer], pages: Sequence[int], targets: Sequence[np.ndarray]
    ) -> Download:
        """Copy pages to the host tier; see `Copier.download`."""
        arrays = [(_bytes_of(keys), _bytes_of(values)) for keys, values in layers]

        def copy() -> None:
            started = time.perf_counter()
            for page, target in zip(pages, targets, strict=True):
                for (keys, values), part in zip(arrays, target, strict=True):
                    part[0] = keys[page]
                    part[1] = values[page]
            self.download_seconds += time.perf_counter() - started

        is_small = sum(target.nbytes for target in targets) <= self._inline_bytes
        done = self._thread.run_now(copy) if is_small else self._thread.submit(copy)
        return Download(done, done)

    def upload(
        self, layers: Sequence[Layer], pages: Sequence[int], sources: Sequence[np.ndarray]
    ) -> Event:
        """Copy pages from the host tier; see `Copier.upload`."""
        arrays = [(_bytes_of(keys), _bytes_of(values)) for keys, values in layers]

        def copy() -> None:
            started = time.perf_counter()
            for page, source in zip(pages, sources, strict=True):
                for (keys, values), part in zip(arrays, source, strict=True):
                    keys[page] = part[0]
                    values[page] = part[1]
            self.upload_seconds += time.perf_counter() - started

        return self._thread.submit(copy)

    def duplicate(self, layers: Sequence[Layer], source: int, target: int) -> None:
        """Copy a page to another."""
        for keys, values in layers:
            keys[target].copy_(keys[source])
            values[target].copy_(values[source])

    def hold(self, event: Event) -> None:
        """Wait for an event here and now, on the thread of the computation."""
        event.wait()

    def close(self) -> None:
        """Finish what was asked for and end."""
        self._thread.close()


def make_copier(device: torch.device) -> Copier:
    """The copier of a device."""
    if device.type == "cuda":
        from nf_kvcache.cuda_copier import CudaCopier

        return CudaCopier(device)
    return CpuCopier()


def _bytes_of(pages: Tensor) -> np.ndarray:
    """The bytes of K or V of a layer, uint8 [num_pages, bytes], without a copy."""
    data: np.ndarray = pages.view(len(pages), -1).view(torch.uint8).numpy()
    return data
