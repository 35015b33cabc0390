"""What the cache asks of a disk tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nf_kvcache.disk import DiskEvents, DiskStats, StoredPage


class StoredRead(Protocol):
    """Pages on their way from a disk. `nf_kvcache.disk.DiskRead` is one."""

    @property
    def done(self) -> bool:
        """As `DiskRead.done`."""

    @property
    def num_good(self) -> int:
        """Leading pages that have arrived intact; asked for when it is done."""

    def cancel(self) -> None:
        """As `DiskRead.cancel`."""


class DiskStore(Protocol):
    """Keeps pages on a disk. `nf_kvcache.disk.DiskTier` is one.

    What it answers decides what the cache does, so that a log of its answers, and a stand-in that
    gives them again, is enough to repeat that (`KVCache`, argument `watch`).
    """

    page_bytes: int
    page_size: int

    @property
    def is_busy(self) -> bool:
        """As `DiskTier.is_busy`."""

    def pages(self) -> list[StoredPage]:
        """As `DiskTier.pages`."""

    def write(
        self, parent_slot: int, salt: bytes, tokens: np.ndarray, data: np.ndarray
    ) -> int | None:
        """As `DiskTier.write`."""

    def read(self, slots: Sequence[int], buffers: Sequence[np.ndarray]) -> StoredRead:
        """As `DiskTier.read`."""

    def touch(self, slots: Sequence[int]) -> None:
        """As `DiskTier.touch`."""

    def poll(self) -> DiskEvents:
        """As `DiskTier.poll`."""

    def wait(self, timeout: float) -> None:
        """As `DiskTier.wait`."""

    def flush(self, timeout: float) -> bool:
        """As `DiskTier.flush`."""

    def stats(self) -> DiskStats:
        """As `DiskTier.stats`."""

    def close(self) -> None:
        """As `DiskTier.close`."""
