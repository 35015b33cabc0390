"""The thread that writes pages."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from nf_kvcache.disk.block_io import QUEUE_DEPTH
from nf_kvcache.disk.completions import Completions, Trouble
from nf_kvcache.disk.page_writer import PageWrite, PageWriter

logger = logging.getLogger("nf_kvcache.disk")


class Writer:
    """A queue in front of a `PageWriter`, and the thread that it works in.

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
        self._thread = threading.Thread(target=self._run, name="kv-disk-writer", daemon=True)
        self._thread.start()

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
        """Finish what is queued and end the thread; False if that takes longer than `timeout`."""
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        is_open = True
        while is_open:
            with self._condition:
                self._condition.wait_for(self._has_work, self._patience())
                batch = [self._writes.popleft() for _ in range(min(QUEUE_DEPTH, len(self._writes)))]
                deletes, self._deletes = self._deletes, []
                stamps, self._stamps = self._stamps, []
                flush = self._flushes_asked if not self._writes else self._flushes_done
                is_open = not self._is_closing or bool(self._writes)
            must_commit = flush > self._flushes_done or not is_open
            self._work(batch, deletes, stamps, must_commit)
            if flush > self._flushes_done:
                with self._condition:
                    self._flushes_done = flush
                    self._condition.notify_all()

    def _has_work(self) -> bool:
        return bool(
            self._writes
            or self._deletes
            or self._stamps
            or self._flushes_asked > self._flushes_done
            or self._is_closing
        )

    def _patience(self) -> float | None:
        due = self._page_writer.due
        return None if due == float("inf") else max(0.0, due - time.monotonic())

    def _work(
        self,
        batch: list[PageWrite],
        deletes: list[int],
        stamps: list[tuple[int, int]],
        must_commit: bool,
    ) -> None:
        writer = self._page_writer
        unreported = batch
        try:
            writer.forget(deletes)
            writer.set_used(stamps)
            if batch:
                is_healthy = writer.write(batch)
                unreported = []
                if not is_healthy:
                    # What is queued would meet the same. It is dropped at once, so that whoever
                    # lent its memory gets that back.
                    with self._condition:
                        unreported = list(self._writes)
                        self._writes.clear()
                    writer.fail(unreported, errno.ECANCELED)
                    unreported = []
            if must_commit or time.monotonic() >= writer.due:
                writer.commit()
        except Exception:
            # Whatever it is, no request may fail for it.
            logger.exception("The disk tier met an error that it does not know.")
            writer.fail(unreported, errno.EIO)
            writer.due = time.monotonic() + self._retry_seconds
            self._completions.put(Trouble(errno.EIO, "an error that is not known"))
