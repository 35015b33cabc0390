"""The files that hold the pages."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nf_kvcache.disk.format import Meta, segment_name

logger = logging.getLogger("nf_kvcache.disk")

MAX_OPEN_FILES = 128
# Of the file system, what an allocation leaves to others, the index among them.
_RESERVED_SHARE = 1 / 50


class _OpenFile:
    """A descriptor, and how many are using it."""

    __slots__ = ("fd", "is_retired", "uses")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.uses = 0
        self.is_retired = False


class Segments:
    """Slots in segment files. Thread-safe.

    Args:
        directory: where the files are.
        meta: their layout.
        num_slots: how many there are; what lies beyond is removed.

    Raises:
        OSError: the directory cannot be read or changed.
    """

    def __init__(self, directory: Path, meta: Meta, num_slots: int) -> None:
        self._directory = directory
        self._slot_bytes = meta.slot_bytes
        self._slots_per_segment = meta.slots_per_segment
        self._num_slots = num_slots
        self._num_segments = -(-num_slots // self._slots_per_segment)
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()  # least recently used first
        self._allocated: set[int] = set()
        self._lock = threading.Lock()
        self._direct = True
        self._sizes = self._trim()

    @property
    def is_direct(self) -> bool:
        """Whether the files are opened with O_DIRECT, as far as is known."""
        return self._direct

    def locate(self, slot: int) -> tuple[int, int]:
        """The segment of a slot, and its offset there in bytes."""
        segment, index = divmod(slot, self._slots_per_segment)
        return segment, index * self._slot_bytes

    def slots_of(self, segment: int) -> range:
        """The slots in a segment."""
        start = segment * self._slots_per_segment
        return range(start, min(start + self._slots_per_segment, self._num_slots))

    def was_there(self, slot: int) -> bool:
        """Whether the file of `slot` existed and reached to its end when this was opened."""
        segment, offset = self.locate(slot)
        return offset + self._slot_bytes <= self._sizes.get(segment, 0)

    def allocate(self, segment: int) -> bool:
        """Make sure that a segment file exists with all of its bytes.

        Returns:
            False if the file had been there and was gone, so that its pages are lost.

        Raises:
            OSError: the disk is full, or the file cannot be made.
        """
        with self._lock:
            try:
                file = self._acquire(segment, os.O_RDWR)
                was_lost = False
            except FileNotFoundError:
                was_lost = segment in self._allocated
                self._allocated.discard(segment)
                file = self._acquire(segment, os.O_RDWR | os.O_CREAT)
        try:
            if segment not in self._allocated:
                self._fill(file.fd, segment)
                self._allocated.add(segment)
        finally:
            self._give_back([file])
        return not was_lost

    @contextmanager
    def borrow(self, segments: Iterable[int]) -> Iterator[dict[int, int]]:
        """File descriptors by segment; they stay open until the end of the block.

        Raises:
            FileNotFoundError: a file was deleted; its `filename` is the number of the segment.
            OSError: a file cannot be opened.
        """
        files: dict[int, _OpenFile] = {}
        try:
            with self._lock:
                for segment in set(segments):
                    files[segment] = self._acquire(segment, os.O_RDWR)
            yield {segment: file.fd for segment, file in files.items()}
        finally:
            self._give_back(files.values())

    def close(self) -> None:
        """Close all files that nobody is using."""
        with self._lock:
            for segment in list(self._open):
                self._retire(segment)

    def _trim(self) -> dict[int, int]:
        """Cut off what lies beyond the last slot; sizes in bytes of the files that are there."""
        sizes: dict[int, int] = {}
        names = {segment_name(segment): segment for segment in range(self._num_segments)}
        for path in self._directory.glob("segment-*.kv"):
            segment = names.get(path.name)
            if segment is None:
                path.unlink()
                continue
            size = path.stat().st_size
            expected = len(self.slots_of(segment)) * self._slot_bytes
            if size > expected:
                os.truncate(path, expected)
            sizes[segment] = min(size, expected)
            if size >= expected:
                self._allocated.add(segment)
        return sizes

    def _acquire(self, segment: int, flags: int) -> _OpenFile:
        """A file, with one more use. The lock is held."""
        file = self._open.get(segment)
        if file is not None and os.fstat(file.fd).st_nlink == 0:
            self._retire(segment)
            file = None
        if file is None:
            while len(self._open) >= MAX_OPEN_FILES:
                self._retire(next(iter(self._open)))
            file = self._open[segment] = _OpenFile(self._open_file(segment, flags))
        self._open.move_to_end(segment)
        file.uses += 1
        return file

    def _open_file(self, segment: int, flags: int) -> int:
        path = self._directory / segment_name(segment)
        flags |= os.O_CLOEXEC
        try:
            if self._direct:
                try:
                    return os.open(path, flags | os.O_DIRECT, 0o600)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._direct = False
                    logger.warning(
                        "%s: this file system has no O_DIRECT; pages go through the page cache.",
                        self._directory,
                    )
            return os.open(path, flags, 0o600)
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, error.strerror, segment) from None

    def _retire(self, segment: int) -> None:
        """Close a file, or have its last user close it. The lock is held."""
        file = self._open.pop(segment)
        file.is_retired = True
        if file.uses == 0:
            os.close(file.fd)

    def _give_back(self, files: Iterable[_OpenFile]) -> None:
        with self._lock:
            for file in files:
                file.uses -= 1
                if file.is_retired and file.uses == 0:
                    os.close(file.fd)

    def _fill(self, fd: int, segment: int) -> None:
        """Allocate all bytes of a segment, unless too little of the file system would be left."""
        expected = len(self.slots_of(segment)) * self._slot_bytes
        state = os.fstat(fd)
        missing = expected - state.st_blocks * 512
        space = os.fstatvfs(fd)
        left = space.f_bavail * space.f_frsize - max(0, missing)
        try:
            # A file system without blocks has no notion of being full.
            if space.f_blocks and left < space.f_blocks * space.f_frsize * _RESERVED_SHARE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(fd, 0, expected)
        except OSError:
            # Half a segment is of no use, and nobody else could use its bytes.
            if state.st_size == 0:
                os.unlink(self._directory / segment_name(segment))
            raise
