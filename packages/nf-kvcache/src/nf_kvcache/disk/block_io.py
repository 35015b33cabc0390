"""How batches of blocks get to files and back."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from nf_kvcache._uring import Ring

logger = logging.getLogger("nf_kvcache.disk")

QUEUE_DEPTH = 32
SHORT_READ = errno.ENODATA  # what a read that meets the end of the file reports


class BlockRequest(NamedTuple):
    """One transfer. `buffer` is uint8 [n]; with O_DIRECT all of it in multiples of 4096 bytes."""

    fd: int
    offset: int
    buffer: npt.NDArray[np.uint8]


class BlockIO(Protocol):
    """Moves batches of blocks, and returns when all of a batch is done. Releases the GIL.

    Several threads use it at the same time.
    """

    @property
    def name(self) -> str:
        """What log lines and statistics call it."""
        ...

    def read_many(self, requests: Sequence[BlockRequest]) -> list[int]:
        """Read; for each request 0 or an errno, ENODATA where the file ends too early."""
        ...

    def write_many(self, requests: Sequence[BlockRequest]) -> list[int]:
        """Write; for each request 0 or an errno."""
        ...

    def sync(self, fd: int) -> int:
        """fdatasync; 0 or an errno."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class ThreadIO:
    """preadv and pwritev in a few threads. Works everywhere."""

    name = "threads"

    def __init__(self) -> None:
        self._read_pool = ThreadPoolExecutor(8, thread_name_prefix="kv-disk-preadv")
        self._write_pool = ThreadPoolExecutor(8, thread_name_prefix="kv-disk-pwritev")

    def read_many(self, requests: Sequence[BlockRequest]) -> list[int]:
        """See `BlockIO`."""
        return list(self._read_pool.map(_read, requests))

    def write_many(self, requests: Sequence[BlockRequest]) -> list[int]:
        """See `BlockIO`."""
        return list(self._write_pool.map(_write, requests))

    def sync(self, fd: int) -> int:
        """See `BlockIO`."""
        return sync_file(fd)

    def close(self) -> None:
        """See `BlockIO`."""
        self._read_pool.shutdown()
        self._write_pool.shutdown()


class UringIO:
    """io_uring.

    Raises:
        ImportError: nf_kvcache was built without liburing.
        OSError: the kernel has no io_uring, or does not allow it.
    """

    name = "io_uring"

    def __init__(self) -> None:
        self._rings = threading.local()
        self._ring()

    def read_many(self, requests: Sequence[BlockRequest]) -> list[int]:
        """See `BlockIO`."""
        return self._ring().run(False, requests)

    def write_many(self, requests: Sequence[BlockRequest]) -> list[int]:
        """See `BlockIO`."""
        return self._ring().run(True, requests)

    def sync(self, fd: int) -> int:
        """See `BlockIO`."""
        return sync_file(fd)

    def close(self) -> None:
        """See `BlockIO`. Each ring goes with the thread that used it."""

    def _ring(self) -> Ring:
        """The ring of this thread: its batches need not wait for those of others."""
        from nf_kvcache._uring import Ring

        ring: Ring | None = getattr(self._rings, "ring", None)
        if ring is None:
            ring = self._rings.ring = Ring(QUEUE_DEPTH)
        return ring


def default_block_io() -> BlockIO:
    """io_uring if it can be had, else threads; one log line says which, and why."""
    try:
        io = UringIO()
    except (ImportError, OSError) as error:
        logger.info("Pages move to and from the disk by preadv and pwritev in threads: %s", error)
        return ThreadIO()
    logger.info("Pages move to and from the disk by io_uring.")
    return io


def sync_file(fd: int) -> int:
    """fdatasync; 0 or an errno."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _read(request: BlockRequest) -> int:
    fd, offset, view = request.fd, request.offset, request.buffer.data
    try:
        while view:
            count = os.preadv(fd, [view], offset)
            if count == 0:
                return SHORT_READ
            offset, view = offset + count, view[count:]
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _write(request: BlockRequest) -> int:
    fd, offset, view = request.fd, request.offset, request.buffer.data
    try:
        while view:
            count = os.pwritev(fd, [view], offset)
            if count == 0:
                return errno.EIO
            offset, view = offset + count, view[count:]
    except OSError as error:
        return error.errno or errno.EIO
    return 0
