"""A thread that waits for the disk, so that another one can prepare what comes next."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from nf_kvcache.disk.block_io import QUEUE_DEPTH

# Of two batches one is on its way while the other one ends, so that the disk always has work.
NUM_TRANSFERS = 2
TRANSFER_PAGES = QUEUE_DEPTH // NUM_TRANSFERS

Call = Callable[[], list[int]]


class IOThread:
    """Runs one call after the other. A daemon: a disk that stands still keeps no process alive.

    Args:
        name: of the thread.
        on_done: called in the thread after each call.
    """

    def __init__(self, name: str, on_done: Callable[[], None]) -> None:
        self._on_done = on_done
        self._queue: queue.SimpleQueue[tuple[Future[list[int]], Call] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self, call: Call) -> Future[list[int]]:
        """Begin a call; its result, or what it raises, is that of the future."""
        future: Future[list[int]] = Future()
        self._queue.put((future, call))
        return future

    def close(self) -> None:
        """End the thread after the calls that have been started."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
            self._on_done()


class BusyClock:
    """Adds up the time during which there was something to wait for.

    Attributes:
        seconds: so far, up to the last `tell`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def tell(self, is_busy: bool) -> None:
        """Whether there is something now."""
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
        self._since = now if is_busy else None
