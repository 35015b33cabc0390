"""What changes the files, in an order that makes a kill at any instant harmless."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nf_kvcache.disk.block_io import BlockIO, BlockRequest
from nf_kvcache.disk.completions import (
    Completions,
    NoSpace,
    PagesLost,
    SegmentLost,
    Trouble,
    WriteEnded,
)
from nf_kvcache.disk.format import page_checksum
from nf_kvcache.disk.page_index import PageIndex, PageRow
from nf_kvcache.disk.segments import Segments

COMMIT_SECONDS = 0.2  # a page is in the index about so long after it was acknowledged
COMMIT_PAGES = 4096


class PageWrite(NamedTuple):
    """A page to be written. `data` is uint8 [slot_bytes] and does not change until it is."""

    row_id: int
    parent_row: int
    salt: bytes | None
    slot: int
    tokens: bytes
    used: int
    identity: int
    data: npt.NDArray[np.uint8]


class PageWriter:
    """Writes pages and their rows. One thread at a time, but for `transfer`.

    1. Rows of evicted pages are deleted. 2. Pages are written to their slots, and acknowledged.
    3. A little later, for many pages at once, the files are synced, and 4. the rows of the pages
    are committed. So a row never speaks of a slot that holds something else, or half a page.

    Nothing is raised; what goes wrong is reported.

    Args:
        io: moves the blocks.
        index: where the rows are.
        segments: where the slots are.
        completions: where everything is reported.
        page_bytes: of a page without padding; what the checksum covers.
        retry_seconds: how long a commit that failed waits for the next attempt.

    Attributes:
        due: when `commit` has to be called, in seconds of `time.monotonic`.
        pages_written, bytes_written: so far.
        commits: how often rows were committed.
    """

    def __init__(
        self,
        io: BlockIO,
        index: PageIndex,
        segments: Segments,
        completions: Completions,
        page_bytes: int,
        retry_seconds: float,
    ) -> None:
        self.due = float("inf")
        self.pages_written = 0
        self.bytes_written = 0
        self.commits = 0
        self._io = io
        self._index = index
        self._segments = segments
        self._completions = completions
        self._page_bytes = page_bytes
        self._retry_seconds = retry_seconds
        self._deletes: list[int] = []
        self._stamps: list[tuple[int, int]] = []
        self._prepared: list[tuple[PageWrite, int]] = []
        self._pending: dict[int, PageRow] = {}  # by id: written, but not in the index yet

    @property
    def is_clean(self) -> bool:
        """Whether everything is in the index."""
        return not (self._deletes or self._stamps or self._pending)

    @property
    def num_prepared(self) -> int:
        """Pages that wait for `take_prepared`."""
        return len(self._prepared)

    def forget(self, row_ids: Iterable[int]) -> None:
        """Delete these rows before anything else is written."""
        for row_id in row_ids:
            self._pending.pop(row_id, None)
            self._deletes.append(row_id)
            self._set_due()

    def set_used(self, stamps: Iterable[tuple[int, int]]) -> None:
        """Record (stamp, row) with the next commit."""
        self._stamps.extend(stamps)
        self._set_due()

    def prepare(self, batch: Sequence[PageWrite]) -> bool:
        """Get pages ready to be written; False if the disk is not to be trusted any more.

        What cannot be written is reported; the rest waits for `take_prepared`.
        """
        try:
            self._commit_deletes()
        except OSError as error:
            self._report(error)
            self.fail(batch, error.errno or errno.EIO)
            return False
        failed, is_healthy = self._allocate(batch)
        self._prepared += [
            (write, page_checksum(write.identity, write.data.data[: self._page_bytes]))
            for write in batch
            if write.slot not in failed
        ]
        for write in batch:
            if write.slot in failed:
                self.fail([write], failed[write.slot])
        return is_healthy

    def take_prepared(self, count: int) -> list[tuple[PageWrite, int]]:
        """At most `count` pages that `prepare` has made ready, with checksums, for `transfer`."""
        prepared = self._prepared[:count]
        del self._prepared[:count]
        return prepared

    def transfer(self, writes: Sequence[tuple[PageWrite, int]]) -> list[int]:
        """Write pages; for each 0 or an errno. May run in other threads."""
        places = [self._segments.locate(write.slot) for write, _ in writes]
        try:
            with self._segments.borrow(segment for segment, _ in places) as fds:
                return self._io.write_many(
                    [
                        BlockRequest(fds[segment], offset, write.data)
                        for (write, _), (segment, offset) in zip(writes, places, strict=True)
                    ]
                )
        except OSError as error:
            return [error.errno or errno.EIO] * len(writes)

    def finish(self, writes: Sequence[tuple[PageWrite, int]], errors: Sequence[int]) -> bool:
        """Report the outcome of `transfer`; False if the disk is not to be trusted any more."""
        for (write, checksum), error in zip(writes, errors, strict=True):
            if error == 0:
                self.pages_written += 1
                self.bytes_written += len(write.data)
                self._pending[write.row_id] = PageRow(
                    write.row_id,
                    write.parent_row,
                    write.salt,
                    write.slot,
                    write.tokens,
                    checksum,
                    write.used,
                )
                self._set_due()
            self._completions.put(WriteEnded(write.slot, checksum, error))
        if len(self._pending) >= COMMIT_PAGES:
            self.commit()
        return not any(errors)

    def fail(self, batch: Iterable[PageWrite], error: int) -> None:
        """Report that these pages were not written."""
        for write in batch:
            self._completions.put(WriteEnded(write.slot, 0, error))

    def commit(self) -> None:
        """Bring everything into the index that is not there yet."""
        self.due = float("inf")
        try:
            self._commit_deletes()
            self._sync()
            self._index.add(list(self._pending.values()))
            self._pending = {}
            self._index.set_used(self._stamps)
            self._stamps = []
            self.commits += 1
        except OSError as error:
            self._report(error)
            self.due = time.monotonic() + self._retry_seconds

    def _set_due(self) -> None:
        if self.due == float("inf"):
            self.due = time.monotonic() + COMMIT_SECONDS

    def _segment(self, slot: int) -> int:
        return self._segments.locate(slot)[0]

    def _report(self, error: OSError) -> None:
        self._completions.put(Trouble(error.errno or errno.EIO, str(error.strerror or error)))

    def _commit_deletes(self) -> None:
        if self._deletes:
            self._index.delete(self._deletes)
            self._deletes = []

    def _allocate(self, batch: Sequence[PageWrite]) -> tuple[dict[int, int], bool]:
        """Make sure of the files.

        Returns:
            An errno for each slot that has none; whether the disk can be trusted.
        """
        failed: dict[int, int] = {}
        is_healthy = True
        for segment in sorted({self._segment(write.slot) for write in batch}):
            try:
                if not self._segments.allocate(segment):
                    self._lose(segment)
            except OSError as error:
                failed |= dict.fromkeys(self._segments.slots_of(segment), error.errno or errno.EIO)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self._completions.put(NoSpace(segment))
                else:
                    is_healthy = False
        return failed, is_healthy

    def _sync(self) -> None:
        """Have the pages on the disk whose rows come next; those that fail get none."""
        segments = sorted({self._segment(row.slot) for row in self._pending.values()})
        for segment in segments:
            try:
                with self._segments.borrow([segment]) as fds:
                    error = self._io.sync(fds[segment])
            except FileNotFoundError:
                self._lose(segment)
                continue
            if error:
                lost = self._take_pending(segment)
                self._completions.put(PagesLost([(row.slot, row.id) for row in lost]))
                self._completions.put(Trouble(error, "fdatasync failed"))

    def _lose(self, segment: int) -> None:
        """Report that the file of a segment was deleted."""
        self._take_pending(segment)
        self._completions.put(SegmentLost(segment))

    def _take_pending(self, segment: int) -> list[PageRow]:
        rows = [row for row in self._pending.values() if self._segment(row.slot) == segment]
        for row in rows:
            del self._pending[row.id]
        return rows
