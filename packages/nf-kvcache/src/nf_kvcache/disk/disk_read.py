"""Reading pages back, in a thread."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nf_kvcache.disk.block_io import QUEUE_DEPTH, SHORT_READ, BlockIO, BlockRequest
from nf_kvcache.disk.completions import Completions, ReadEnded, SegmentLost, Trouble
from nf_kvcache.disk.format import page_checksum
from nf_kvcache.disk.segments import Segments

logger = logging.getLogger("nf_kvcache.disk")


class PageRead(NamedTuple):
    """A page to be read, and what it must turn out to be. `buffer` is uint8 [slot_bytes]."""

    slot: int
    row_id: int
    identity: int
    checksum: int
    buffer: npt.NDArray[np.uint8]


class DiskRead:
    """Pages on their way from the disk. The buffers belong to it until it is done.

    Attributes:
        pages: what is read, in order.
        num_good: leading pages that have arrived intact so far.
    """

    def __init__(self, pages: Sequence[PageRead]) -> None:
        self.pages = pages
        self.num_good = 0
        self._num_begun = 0
        self._is_cancelled = False
        self._is_done = not pages

    @property
    def done(self) -> bool:
        """Whether nothing more will arrive: all did, one was not intact, or it was cancelled."""
        return self._is_done

    @property
    def slots(self) -> list[int]:
        """What is read."""
        return [page.slot for page in self.pages]

    def cancel(self) -> None:
        """Read nothing that has not been started. Wait for `done` before using the buffers."""
        self._is_cancelled = True


class Reader:
    """The thread that reads pages, several `DiskRead` at a time.

    Args:
        io: moves the blocks.
        segments: where the slots are.
        completions: where the end of each read is reported.
        page_bytes: of a page without padding; what the checksum covers.

    Attributes:
        pages_read, bytes_read: so far.
        seconds: spent on reading.
    """

    def __init__(
        self, io: BlockIO, segments: Segments, completions: Completions, page_bytes: int
    ) -> None:
        self.pages_read = 0
        self.bytes_read = 0
        self.seconds = 0.0
        self._io = io
        self._segments = segments
        self._completions = completions
        self._page_bytes = page_bytes
        self._condition = threading.Condition()
        self._queue: deque[DiskRead] = deque()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-disk-reader", daemon=True)
        self._thread.start()

    def read(self, read: DiskRead) -> None:
        """Queue a read."""
        with self._condition:
            self._queue.append(read)
            self._condition.notify_all()

    def close(self, timeout: float) -> bool:
        """Cancel what is queued and end the thread; False if that takes longer than `timeout`."""
        with self._condition:
            self._is_closing = True
            for read in self._queue:
                read.cancel()
            self._condition.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        reads: list[DiskRead] = []  # those that have begun, in order
        while True:
            with self._condition:
                if not reads:
                    self._condition.wait_for(lambda: self._queue or self._is_closing)
                    if not self._queue:
                        return
                reads.extend(self._queue)
                self._queue.clear()
                if self._is_closing:
                    for read in reads:
                        read.cancel()
            reads = self._step(reads)

    def _step(self, reads: list[DiskRead]) -> list[DiskRead]:
        """Read the next pages of the first reads; those that are not done yet."""
        chunk: list[tuple[DiskRead, PageRead]] = []
        for read in reads:
            if read._is_cancelled:
                self._end(read, None)
                continue
            count = QUEUE_DEPTH - len(chunk)
            pages = read.pages[read._num_begun : read._num_begun + count]
            read._num_begun += len(pages)
            chunk.extend((read, page) for page in pages)
        if chunk:
            try:
                errors = self._read([page for _, page in chunk])
            except Exception:
                logger.exception("The disk tier met an error that it does not know.")
                errors = [errno.ECANCELED] * len(chunk)
            for (read, page), error in zip(chunk, errors, strict=True):
                if not read.done:
                    self._check(read, page, error)
        return [read for read in reads if not read.done]

    def _read(self, pages: list[PageRead]) -> list[int]:
        """Transfer a chunk; for each page 0 or an errno."""
        places = [self._segments.locate(page.slot) for page in pages]
        started = time.perf_counter()
        try:
            with self._segments.borrow(segment for segment, _ in places) as fds:
                errors = self._io.read_many(
                    [
                        BlockRequest(fds[segment], offset, page.buffer)
                        for page, (segment, offset) in zip(pages, places, strict=True)
                    ]
                )
        except FileNotFoundError as error:
            # The pages in other files are read another time.
            self._completions.put(SegmentLost(int(error.filename)))
            return [errno.ENOENT] * len(pages)
        except OSError as error:
            return [error.errno or errno.ENOMEM] * len(pages)
        finally:
            self.seconds += time.perf_counter() - started
        return errors

    def _check(self, read: DiskRead, page: PageRead, error: int) -> None:
        """See whether a page is intact, and end its read if it is not, or the last."""
        if error in (0, SHORT_READ, errno.EIO):
            is_damaged = error != 0 or page.checksum != page_checksum(
                page.identity, page.buffer.data[: self._page_bytes]
            )
        else:
            is_damaged = False  # it may be there; it cannot be had now
        if error == 0 and not is_damaged:
            read.num_good += 1
            self.pages_read += 1
            self.bytes_read += len(page.buffer)
            if read.num_good == len(read.pages):
                self._end(read, None)
            return
        if error not in (0, SHORT_READ, errno.ENOENT):
            self._completions.put(Trouble(error, "a page cannot be read"))
        self._end(read, (page.slot, page.row_id) if is_damaged else None)

    def _end(self, read: DiskRead, damaged: tuple[int, int] | None) -> None:
        read._is_done = True
        self._completions.put(ReadEnded(read, damaged))
