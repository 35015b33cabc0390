"""The threads that write pages."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from nf_kvcache.disk.block_io import QUEUE_DEPTH
from nf_kvcache.disk.completions import Completions, Trouble
from nf_kvcache.disk.io_thread import NUM_TRANSFERS, TRANSFER_PAGES, BusyClock, IOThread
from nf_kvcache.disk.page_writer import PageWrite, PageWriter

logger = logging.getLogger("nf_kvcache.disk")


class _Transfer(NamedTuple):
    """Pages that are being written."""

    writes: list[tuple[PageWrite, int]]
    future: Future[list[int]]


class _Work(NamedTuple):
    """What the owner has asked for since the last time."""

    batch: list[PageWrite]
    deletes: list[int]
    stamps: list[tuple[int, int]]
    flush: int  # number of the flush that is done when all of this is
    is_last: bool


class Writer:
    """A queue in front of a `PageWriter`, and a thread in which it works.

    Further threads do nothing but wait for the disk, which is kept busy so: while batches are
    written, rows of evicted pages are deleted and checksums computed for the next ones.

    Args:
        page_writer: does the work.
        completions: where it is said that the thread had to give up on something.
        retry_seconds: how long to leave everything alone after an error that is not known.
    """

    def __init__(
        self, page_writer: PageWriter, completions: Completions, retry_seconds: float
    ) -> None:
        self._page_writer = page_writer
        self._completions = completions
        self._retry_seconds = retry_seconds
        self._condition = threading.Condition()
        self._writes: deque[PageWrite] = deque()
        self._deletes: list[int] = []
        self._stamps: list[tuple[int, int]] = []
        self._flushes_asked = 0
        self._flushes_done = 0
        self._is_closing = False
        # Of the thread alone.
        self._clock = BusyClock()
        self._transfers: deque[_Transfer] = deque()
        self._io_threads = deque(
            IOThread("kv-disk-write", self._wake) for _ in range(NUM_TRANSFERS)
        )
        self._thread = threading.Thread(target=self._run, name="kv-disk-writer", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """How long pages were being written so far."""
        return self._clock.seconds

    def write(self, write: PageWrite) -> None:
        """Queue a page."""
        with self._condition:
            self._writes.append(write)
            self._condition.notify_all()

    def forget(self, row_ids: Sequence[int]) -> None:
        """Delete rows, before anything that is queued later is written."""
        with self._condition:
            self._deletes.extend(row_ids)
            self._condition.notify_all()

    def set_used(self, stamps: Sequence[tuple[int, int]]) -> None:
        """Record (stamp, row) with the next commit."""
        with self._condition:
            self._stamps.extend(stamps)
            self._condition.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until everything that is queued is written and in the index.

        Returns:
            False if it is not after `timeout` seconds, or because the disk refuses it.
        """
        with self._condition:
            self._flushes_asked += 1
            flush = self._flushes_asked
            self._condition.notify_all()
            is_done = self._condition.wait_for(lambda: self._flushes_done >= flush, timeout)
            return is_done and self._page_writer.is_clean

    def close(self, timeout: float) -> bool:
        """Finish what is queued and end the threads; False if that takes longer than `timeout`."""
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(self._has_work, self._patience())
                work = self._take()
            try:
                self._do(work)
            except Exception:
                # Whatever it is, no request may fail for it.
                logger.exception("The disk tier met an error that it does not know.")
                self._page_writer.due = time.monotonic() + self._retry_seconds
                self._completions.put(Trouble(errno.EIO, "an error that is not known"))
            if work.is_last and not self._transfers:
                with self._condition:
                    self._flushes_done = max(self._flushes_done, work.flush)
                    self._condition.notify_all()
                    if self._is_closing and self._is_idle():
                        break
        for io_thread in self._io_threads:
            io_thread.close()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _has_work(self) -> bool:
        """Whether there is something to do now. The condition is held."""
        if self._transfers and self._transfers[0].future.done():
            return True
        if self._page_writer.num_prepared < QUEUE_DEPTH and self._writes:
            return True
        if self._deletes or self._stamps:
            return True
        is_waited_for = self._flushes_asked > self._flushes_done or self._is_closing
        return is_waited_for and not self._transfers

    def _patience(self) -> float | None:
        due = self._page_writer.due
        return None if due == float("inf") else max(0.0, due - time.monotonic())

    def _is_idle(self) -> bool:
        return not (self._writes or self._deletes or self._stamps or self._transfers)

    def _take(self) -> _Work:
        """The next batch. The condition is held."""
        count = min(QUEUE_DEPTH - self._page_writer.num_prepared, len(self._writes))
        batch = [self._writes.popleft() for _ in range(count)]
        work = _Work(batch, self._deletes, self._stamps, self._flushes_asked, not self._writes)
        self._deletes, self._stamps = [], []
        return work

    def _do(self, work: _Work) -> None:
        writer = self._page_writer
        writer.forget(work.deletes)
        writer.set_used(work.stamps)
        is_healthy = not work.batch or self._prepare(work.batch)
        # In order, so that no page is reported before the one that it builds on.
        ended = []
        while self._transfers and self._transfers[0].future.done():
            ended.append(self._transfers.popleft())
        while writer.num_prepared and len(self._transfers) < NUM_TRANSFERS:
            writes = writer.take_prepared(TRANSFER_PAGES)
            future = self._io_threads[0].start(partial(writer.transfer, writes))
            self._io_threads.rotate()
            self._transfers.append(_Transfer(writes, future))
        self._clock.tell(bool(self._transfers))
        for transfer in ended:  # reported when the disk has something to do again
            is_healthy &= self._finish(transfer)
        if not is_healthy:
            # What is queued would meet the same. It is dropped at once, so that whoever lent its
            # memory gets that back.
            with self._condition:
                dropped = list(self._writes)
                self._writes.clear()
            writer.fail(dropped, errno.ECANCELED)
        is_asked = work.flush > self._flushes_done or self._is_closing
        is_end = work.is_last and not self._transfers
        if (is_asked and is_end) or time.monotonic() >= writer.due:
            writer.commit()

    def _prepare(self, batch: list[PageWrite]) -> bool:
        try:
            return self._page_writer.prepare(batch)
        except Exception:
            self._page_writer.fail(batch, errno.EIO)
            raise

    def _finish(self, transfer: _Transfer) -> bool:
        try:
            errors = transfer.future.result()
        except Exception:
            logger.exception("The disk tier met an error that it does not know.")
            errors = [errno.EIO] * len(transfer.writes)
        return self._page_writer.finish(transfer.writes, errors)
