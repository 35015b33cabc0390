"""Reading pages back, in a thread."""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nf_kvcache.disk.block_io import SHORT_READ, BlockIO, BlockRequest
from nf_kvcache.disk.completions import Completions, ReadEnded, SegmentLost, Trouble
from nf_kvcache.disk.format import page_checksum
from nf_kvcache.disk.io_thread import NUM_TRANSFERS, TRANSFER_PAGES, BusyClock, IOThread
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
        # What follows belongs to the reader.
        self.num_begun = 0
        self.num_ended = 0
        self.is_stopped = False
        self.damaged: tuple[int, int] | None = None
        self.is_done = not pages

    @property
    def done(self) -> bool:
        """Whether nothing more will arrive: all did, one was not intact, or it was cancelled."""
        return self.is_done

    @property
    def slots(self) -> list[int]:
        """What is read."""
        return [page.slot for page in self.pages]

    def cancel(self) -> None:
        """Read nothing that has not been started. Wait for `done` before using the buffers."""
        self.is_stopped = True


class _Transfer(NamedTuple):
    """Pages that are being read."""

    pages: list[tuple[DiskRead, PageRead]]
    future: Future[list[int]]


class Reader:
    """The threads that read pages, several `DiskRead` at a time, in order.

    Args:
        io: moves the blocks.
        segments: where the slots are.
        completions: where the end of each read is reported.
        page_bytes: of a page without padding; what the checksum covers.

    Attributes:
        pages_read, bytes_read: so far.
    """

    def __init__(
        self, io: BlockIO, segments: Segments, completions: Completions, page_bytes: int
    ) -> None:
        self.pages_read = 0
        self.bytes_read = 0
        self._io = io
        self._segments = segments
        self._completions = completions
        self._page_bytes = page_bytes
        self._condition = threading.Condition()
        self._queue: deque[DiskRead] = deque()
        self._is_closing = False
        # Of the thread alone.
        self._reads: list[DiskRead] = []
        self._clock = BusyClock()
        self._transfers: deque[_Transfer] = deque()
        self._io_threads = deque(IOThread("kv-disk-read", self._wake) for _ in range(NUM_TRANSFERS))
        self._thread = threading.Thread(target=self._run, name="kv-disk-reader", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """How long pages were being read so far."""
        return self._clock.seconds

    def read(self, read: DiskRead) -> None:
        """Queue a read."""
        with self._condition:
            self._queue.append(read)
            self._condition.notify_all()

    def close(self, timeout: float) -> bool:
        """Cancel what is queued and end the threads; False if that takes longer than `timeout`."""
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(self._has_work)
                self._reads.extend(self._queue)
                self._queue.clear()
                is_closing = self._is_closing
            if is_closing:
                for read in self._reads:
                    read.cancel()
            ended = []
            while self._transfers and self._transfers[0].future.done():
                ended.append(self._transfers.popleft())
            while len(self._transfers) < NUM_TRANSFERS and (pages := self._next_pages()):
                future = self._io_threads[0].start(partial(self._read, [page for _, page in pages]))
                self._io_threads.rotate()
                self._transfers.append(_Transfer(pages, future))
            self._clock.tell(bool(self._transfers))
            for transfer in ended:  # verified while the disk reads on
                self._finish(transfer)
            for read in self._reads:
                self._end_if_over(read)
            self._reads = [read for read in self._reads if not read.done]
            if is_closing and not self._reads and not self._transfers:
                break
        for io_thread in self._io_threads:
            io_thread.close()

    def _has_work(self) -> bool:
        """Whether there is something to do now. The condition is held."""
        if self._transfers and self._transfers[0].future.done():
            return True
        return bool(self._queue) or (self._is_closing and not self._transfers)

    def _next_pages(self) -> list[tuple[DiskRead, PageRead]]:
        """What is to be read next, of one `DiskRead` or several."""
        chunk: list[tuple[DiskRead, PageRead]] = []
        for read in self._reads:
            if not read.is_stopped:
                stop = read.num_begun + TRANSFER_PAGES - len(chunk)
                pages = read.pages[read.num_begun : stop]
                read.num_begun += len(pages)
                chunk.extend((read, page) for page in pages)
        return chunk

    def _finish(self, transfer: _Transfer) -> None:
        """Verify what has arrived."""
        try:
            errors = transfer.future.result()
        except Exception:
            logger.exception("The disk tier met an error that it does not know.")
            errors = [errno.ECANCELED] * len(transfer.pages)
        for (read, page), error in zip(transfer.pages, errors, strict=True):
            if read.num_good == read.num_ended:  # else one before it is missing
                self._check(read, page, error)
            read.num_ended += 1

    def _read(self, pages: list[PageRead]) -> list[int]:
        """Transfer a chunk; for each page 0 or an errno."""
        places = [self._segments.locate(page.slot) for page in pages]
        try:
            with self._segments.borrow(segment for segment, _ in places) as fds:
                return self._io.read_many(
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

    def _check(self, read: DiskRead, page: PageRead, error: int) -> None:
        """See whether a page is intact; if it is not, what follows it is of no use."""
        if error == 0 and page.checksum == page_checksum(
            page.identity, page.buffer.data[: self._page_bytes]
        ):
            read.num_good += 1
            self.pages_read += 1
            self.bytes_read += len(page.buffer)
            return
        read.is_stopped = True
        # After another error the page may be intact; it cannot be had now.
        if error in (0, SHORT_READ, errno.EIO):
            read.damaged = (page.slot, page.row_id)
        if error not in (0, SHORT_READ, errno.ENOENT):
            self._completions.put(Trouble(error, "a page cannot be read"))

    def _end_if_over(self, read: DiskRead) -> None:
        """Report the end of a read when nothing of it is under way or left."""
        is_begun = read.is_stopped or read.num_begun == len(read.pages)
        if is_begun and read.num_ended == read.num_begun:
            read.is_done = True
            self._completions.put(ReadEnded(read, read.damaged))
