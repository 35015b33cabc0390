"""What a cache asks of a tier on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class StoredPage:
    """A page that an earlier process has left.

    Attributes:
        slot: where it is.
        parent_slot: of the page before it; -1 if it is the first of its prefix.
        salt: of the root of its prefix.
        tokens: int32 [page_size].
    """

    slot: int
    parent_slot: int
    salt: bytes
    tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class DiskEvents:
    """What has happened; each slot is told of once.

    Attributes:
        written: slots whose page is on disk for good.
        failed: slots whose page could not be written, and that hold nothing.
        evicted: slots that hold their page no more: needed for another, damaged, or gone.
    """

    written: Sequence[int] = ()
    failed: Sequence[int] = ()
    evicted: Sequence[int] = ()


class DiskRead(Protocol):
    """A read that is under way."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""

    @property
    def num_good(self) -> int:
        """Pages that arrived intact, counted from the first."""

    def cancel(self) -> None:
        """Do not read what has not been read yet."""


class DiskTier(Protocol):
    """Slots for pages on disk. A page is there only while the one before it is, or it is a first.

    All methods are called by one thread, and none waits for the disk but `wait`, `flush` and
    `close`.
    """

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""

    @property
    def page_size(self) -> int:
        """Tokens of a page."""

    def pages(self) -> Iterable[StoredPage]:
        """What an earlier process has left, every page after the one before it."""

    def write(
        self, parent_slot: int, salt: bytes, tokens: np.ndarray, data: np.ndarray
    ) -> int | None:
        """Queue a page.

        Args:
            parent_slot: of the page before it, which may be queued itself; -1 for a first one.
            salt: of the root.
            tokens: int32 [page_size].
            data: uint8, a page and the gap to the next multiple of 4096 bytes, aligned to that.
                It must not change until `poll` tells of the slot.

        Returns:
            Its slot; None if it was dropped, and counted.
        """

    def read(self, slots: Sequence[int], buffers: Sequence[np.ndarray]) -> DiskRead:
        """Begin to read pages into buffers like those of `write`."""

    def touch(self, slots: Sequence[int]) -> None:
        """Count pages of one prefix, first page first, as used now."""

    def poll(self) -> DiskEvents:
        """What has happened since the last call."""

    def wait(self, timeout: float) -> None:
        """Wait until something happens, `timeout` seconds at most."""

    def flush(self, timeout: float) -> bool:
        """Wait until all that is queued was written; False if that takes too long."""

    def close(self) -> None:
        """End; what is queued is dropped."""
