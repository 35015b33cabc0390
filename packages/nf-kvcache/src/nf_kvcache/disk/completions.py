"""What the threads of the disk tier tell its owner."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nf_kvcache.disk.disk_read import DiskRead


@dataclass(frozen=True, slots=True)
class WriteEnded:
    """The data of a queued slot is not needed any more. `error` is 0 if it is on the disk."""

    slot: int
    checksum: int
    error: int


@dataclass(frozen=True, slots=True)
class ReadEnded:
    """Nothing more is read for `read`. `damaged`: slot and row of a page that is not intact."""

    read: DiskRead
    damaged: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class PagesLost:
    """Slots and rows whose pages did not reach the disk after all."""

    pages: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class SegmentLost:
    """The file of a segment was deleted."""

    segment: int


@dataclass(frozen=True, slots=True)
class NoSpace:
    """The disk has no room for a segment."""

    segment: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that concerns no page in particular. `error` is an errno."""

    error: int
    message: str


Completion = WriteEnded | ReadEnded | PagesLost | SegmentLost | NoSpace | Trouble


@dataclass(slots=True)
class Completions:
    """A queue from several threads to one."""

    _queue: deque[Completion] = field(default_factory=deque)
    _event: threading.Event = field(default_factory=threading.Event)

    def put(self, completion: Completion) -> None:
        """Add one."""
        self._queue.append(completion)
        self._event.set()

    def take_all(self) -> list[Completion]:
        """Remove and return all, oldest first."""
        self._event.clear()
        return [self._queue.popleft() for _ in range(len(self._queue))]

    def wait(self, timeout: float) -> None:
        """Until there is one, or `timeout` seconds have passed."""
        self._event.wait(timeout)
