"""What the disk tier did so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DiskStats:
    """A snapshot.

    Attributes:
        io: "io_uring" or "threads".
        is_direct: whether pages bypass the page cache.
        is_degraded: whether nothing is written because of an error.
        slots_total: pages that there is room for.
        pages_stored: pages that can be read.
        pages_queued: pages on their way to the disk.
        pages_found: pages that an earlier process left.
        pages_written: pages that got to the disk.
        pages_read: pages that came back intact.
        bytes_written, bytes_read: the same in bytes.
        write_seconds: time during which pages were being written.
        read_seconds: time during which pages were being read.
        commits: commits of the index that added pages.
        evictions: pages that gave way to others.
        pages_damaged: pages that were dropped because they, or what they build on, were damaged or
            their file was deleted.
        writes_dropped: pages that were not accepted, by reason: "queue full", "no slot",
            "degraded", "no parent".
        writes_failed: pages that were accepted and did not get to the disk.
        errors: errors by name, such as "ENOSPC".
    """

    io: str
    is_direct: bool
    is_degraded: bool
    slots_total: int
    pages_stored: int
    pages_queued: int
    pages_found: int
    pages_written: int
    pages_read: int
    bytes_written: int
    bytes_read: int
    write_seconds: float
    read_seconds: float
    commits: int
    evictions: int
    pages_damaged: int
    writes_dropped: Mapping[str, int]
    writes_failed: int
    errors: Mapping[str, int]
