"""Whether the disk is written to, and what went wrong."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("nf_kvcache.disk")


class DiskHealth:
    """Counts errors, and keeps away from a disk that had one for a while.

    Each change of state is one log line, however many errors there are.

    Args:
        path: what log lines call the disk.
        retry_seconds: after an error nothing is written for so long; then it is tried again.
        clock: seconds that only rise.

    Attributes:
        errors: by name, such as "ENOSPC".
        is_degraded: whether the last that was heard of the disk was an error.
    """

    def __init__(
        self, path: Path, retry_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.errors: Counter[str] = Counter()
        self.is_degraded = False
        self._path = path
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._retry_at = 0.0
        self._full_until: float | None = None

    @property
    def may_write(self) -> bool:
        """Whether a page may be written now."""
        return not self.is_degraded or self._clock() >= self._retry_at

    def count(self, error: int) -> None:
        """Count an error that changes nothing."""
        self.errors[errno.errorcode.get(error, str(error))] += 1

    def trouble(self, error: int, message: str) -> None:
        """An error: nothing is written for a while."""
        self.count(error)
        if not self.is_degraded:
            logger.warning(
                "%s: %s (%s). No pages are written for %g s, and requests go on without.",
                self._path,
                message,
                os.strerror(error),
                self._retry_seconds,
            )
        self.is_degraded = True
        self._retry_at = self._clock() + self._retry_seconds

    def success(self) -> None:
        """A page got to the disk."""
        if self.is_degraded and self._clock() >= self._retry_at:
            self.is_degraded = False
            logger.warning("%s: pages are written again.", self._path)

    def full(self, num_slots: int) -> None:
        """The disk has no room for more than `num_slots` pages, which is less than is allowed."""
        self.count(errno.ENOSPC)
        if self._full_until is None:
            logger.warning(
                "%s: the disk is full; the cache makes do with room for %d pages.",
                self._path,
                num_slots,
            )
        self._full_until = self._clock() + self._retry_seconds

    def may_grow_again(self) -> bool:
        """True once after `full`, when it is time to ask for more room again."""
        if self._full_until is None or self._clock() < self._full_until:
            return False
        self._full_until = float("inf")  # said once; the log line is not repeated
        return True
