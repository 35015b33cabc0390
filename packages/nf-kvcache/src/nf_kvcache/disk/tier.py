"""The disk tier: pages in slots, found again by the next process."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from nf_kvcache.disk.block_io import BlockIO, default_block_io
from nf_kvcache.disk.buffers import check_buffer
from nf_kvcache.disk.completions import Completions
from nf_kvcache.disk.directory import CacheDirectory
from nf_kvcache.disk.disk_read import DiskRead, PageRead, Reader
from nf_kvcache.disk.format import (
    MAX_SALT_BYTES,
    ROOT,
    Meta,
    child_identity,
    root_identity,
)
from nf_kvcache.disk.health import DiskHealth
from nf_kvcache.disk.page_book import DiskEvents, PageBook
from nf_kvcache.disk.page_writer import PageWrite, PageWriter
from nf_kvcache.disk.restore import StoredPage, restore
from nf_kvcache.disk.segments import Segments
from nf_kvcache.disk.slot_tree import NONE, STORED, SlotTree
from nf_kvcache.disk.stats import DiskStats
from nf_kvcache.disk.writer import Writer
from nf_kvcache.fingerprint import Fingerprint

logger = logging.getLogger("nf_kvcache.disk")

_STAMP_SECONDS = 5.0  # how long it may take until the index knows of a use


class DiskTier:
    """Pages of KV in files, within a bound, that survive the end of the process at any instant.

    A page is on the disk only while the page before it is. One thread, the owner, calls all
    methods; none of them waits for the disk but opening, `flush` and `close`. Nothing that the
    disk does is raised: pages are dropped and counted, and the owner computes them again.

    Args:
        directory: shared with other models and ranks, which have subdirectories of their own.
        fingerprint: of the model and its KV. Only pages under the same one are ever read.
        page_bytes: of a page.
        page_size: token slots in a page.
        max_bytes: all files together never take more.
        replica: number of this engine among those of the same model on this directory.
        rank: number of this process within the engine.
        max_queued_pages: pages on their way to the disk; what comes on top is dropped.
        retry_seconds: how long nothing is written after an error.
        io: how blocks are moved; by default io_uring if it can be had, else threads.

    Attributes:
        num_slots: pages there is room for.
        page_bytes: as given.
        page_size: as given.
        slot_bytes: bytes of a page with padding, a multiple of 4096.

    Raises:
        CacheInUse: another process has the same subdirectory.
        OSError: the directory cannot be made, read or written.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fingerprint: Fingerprint,
        *,
        page_bytes: int,
        page_size: int,
        max_bytes: int,
        replica: int = 0,
        rank: int = 0,
        max_queued_pages: int = 64,
        retry_seconds: float = 30.0,
        io: BlockIO | None = None,
    ) -> None:
        if page_size != fingerprint.page_size:
            raise ValueError(
                f"page_size is {page_size}; expected {fingerprint.page_size}, as the fingerprint "
                "has it."
            )
        for name, value, least in (
            ("page_bytes", page_bytes, 1),
            ("max_queued_pages", max_queued_pages, 1),
            ("replica", replica, 0),
            ("rank", rank, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}.")
        meta = Meta.of(fingerprint, page_bytes)
        self.slot_bytes = meta.slot_bytes
        self.page_bytes = page_bytes
        self.page_size = page_size
        self._max_queued_pages = max_queued_pages
        with ExitStack() as opened:
            self._directory = CacheDirectory(directory, meta, replica, rank)
            opened.callback(self._directory.close)
            self._index, capacity = self._directory.open_index(max_bytes)
            opened.callback(self._index.close)
            self._segments = Segments(self._directory.path, meta, capacity.num_slots)
            self.num_slots = capacity.num_slots
            self._tree = SlotTree(self.num_slots)
            restored = restore(self._index, self._segments, self._tree, page_size)
            opened.pop_all()
        self._left = restored.pages
        self._pages_found = len(restored.pages)
        self._next_row = restored.next_row
        self._stamp = restored.last_stamp
        # What is evicted ahead, so that `write` finds free slots whose eviction is known already.
        self._spare = min(max_queued_pages, max(1, self.num_slots // 16))

        self._health = DiskHealth(self._directory.path, retry_seconds)
        self._io = default_block_io() if io is None else io
        self._completions = Completions()
        self._page_writer = PageWriter(
            self._io, self._index, self._segments, self._completions, page_bytes, retry_seconds
        )
        self._writer = Writer(self._page_writer, self._completions, retry_seconds)
        self._reader = Reader(self._io, self._segments, self._completions, page_bytes)
        self._writer.forget(restored.useless_rows)
        self._book = PageBook(
            self._directory.path, self._tree, self._segments, self._health, self._writer.forget
        )
        self._touched: set[int] = set()
        self._stamps_due = float("inf")
        self._dropped: Counter[str] = Counter()

    def pages(self) -> list[StoredPage]:
        """What an earlier process left, parents before children. Handed over once, then empty."""
        pages, self._left = self._left, []
        return pages

    def write(
        self,
        parent_slot: int,
        salt: bytes,
        tokens: npt.NDArray[np.int32],
        data: npt.NDArray[np.uint8],
    ) -> int | None:
        """Queue a page that is not on the disk yet.

        Args:
            parent_slot: of the page before it, which may be queued itself; -1: it is the first.
            salt: what keeps prefixes of different owners apart, at most 64 bytes; only looked at
                for a first page.
            tokens: int32 [page_size].
            data: uint8 [slot_bytes], at an address that is a multiple of 4096. It must not change
                until `poll` reports the slot.

        Returns:
            The slot; or None: the page is dropped, and counted. Too many are queued, all slots are
            in use, the disk has failed, or its parent is not there.

        Raises:
            ValueError: an argument has a wrong type, size or alignment.
        """
        check_buffer(data, self.slot_bytes)
        if tokens.shape != (self.page_size,) or tokens.dtype != np.int32:
            raise ValueError(
                f"tokens is {tokens.dtype} {list(tokens.shape)}; expected int32 [{self.page_size}]."
            )
        if len(salt) > MAX_SALT_BYTES:
            raise ValueError(
                f"salt has {len(salt)} bytes; expected at most {MAX_SALT_BYTES}: take a digest."
            )
        is_root = parent_slot == NONE
        if not is_root:
            self._check_slot(parent_slot)
        tree = self._tree
        if not self._health.may_write:
            self._dropped["degraded"] += 1
            return None
        if tree.num_queued >= self._max_queued_pages:
            self._dropped["queue full"] += 1
            return None
        if not is_root and not tree.can_have_children(parent_slot):
            self._dropped["no parent"] += 1
            return None
        slot = tree.take(parent_slot, self._next_stamp())
        if slot is None:
            self._dropped["no slot"] += 1
            return None
        token_bytes = tokens.astype("<i4", copy=False).tobytes()
        parent_identity = root_identity(salt) if is_root else tree.identity[parent_slot]
        tree.identity[slot] = child_identity(parent_identity, token_bytes)
        tree.row_id[slot] = self._next_row
        self._next_row += 1
        self._writer.write(
            PageWrite(
                row_id=tree.row_id[slot],
                parent_row=ROOT if is_root else tree.row_id[parent_slot],
                salt=salt if is_root else None,
                slot=slot,
                tokens=token_bytes,
                used=tree.used[slot],
                identity=tree.identity[slot],
                data=data,
            )
        )
        return slot

    @property
    def is_busy(self) -> bool:
        """Whether `write` would drop a page for which there will be time or room later."""
        tree = self._tree
        return (
            self._health.may_write
            and tree.num_queued > 0
            and (tree.num_queued >= self._max_queued_pages or tree.num_free == 0)
        )

    def read(self, slots: Sequence[int], buffers: Sequence[npt.NDArray[np.uint8]]) -> DiskRead:
        """Begin to read pages; they cannot be evicted until `poll` has seen the end of it.

        Args:
            slots: that hold pages, as far as `poll` has said.
            buffers: for each uint8 [slot_bytes], at an address that is a multiple of 4096.

        Raises:
            KeyError: a slot holds no page.
            ValueError: a buffer has a wrong type, size or alignment, or is missing.
        """
        if len(slots) != len(buffers):
            raise ValueError(f"buffers has {len(buffers)} entries; expected {len(slots)}.")
        for buffer in buffers:
            check_buffer(buffer, self.slot_bytes)
        tree = self._tree
        for slot in slots:
            self._check_stored(slot)
        read = DiskRead(
            [
                PageRead(slot, tree.row_id[slot], tree.identity[slot], tree.checksum[slot], buffer)
                for slot, buffer in zip(slots, buffers, strict=True)
            ]
        )
        if slots:
            for slot in slots:
                tree.pin(slot)
            self._reader.read(read)
        return read

    def touch(self, slots: Sequence[int]) -> None:
        """Make `slots`, a path with parents first, the most recently used.

        Raises:
            KeyError: a slot holds no page.
        """
        for slot in slots:
            self._check_stored(slot)
        for slot in reversed(slots):  # whoever uses a page uses all before it
            self._tree.touch(slot, self._next_stamp())
        self._touched.update(slots)
        if self._stamps_due == float("inf") and slots:
            self._stamps_due = time.monotonic() + _STAMP_SECONDS

    def poll(self) -> DiskEvents:
        """Take note of what has finished, and evict what is needed for the writes to come."""
        for completion in self._completions.take_all():
            self._book.note(completion)
        self._book.make_room(self._spare)
        if time.monotonic() >= self._stamps_due:
            self._send_stamps()
        return self._book.take_events()

    def wait(self, timeout: float) -> None:
        """Wait until there is something to `poll`, or `timeout` seconds."""
        self._completions.wait(timeout)

    def flush(self, timeout: float) -> bool:
        """Wait until all queued pages are on the disk and in the index, at most `timeout` seconds.

        `poll` then tells which.

        Returns:
            False if some are not.
        """
        self._send_stamps()
        return self._writer.flush(timeout)

    def stats(self) -> DiskStats:
        """What happened so far."""
        return DiskStats(
            io=self._io.name,
            is_direct=self._segments.is_direct,
            is_degraded=self._health.is_degraded,
            slots_total=self.num_slots,
            pages_stored=self._tree.num_stored,
            pages_queued=self._tree.num_queued,
            pages_found=self._pages_found,
            pages_written=self._page_writer.pages_written,
            pages_read=self._reader.pages_read,
            bytes_written=self._page_writer.bytes_written,
            bytes_read=self._reader.bytes_read,
            write_seconds=self._writer.seconds,
            read_seconds=self._reader.seconds,
            commits=self._page_writer.commits,
            evictions=self._book.evictions,
            pages_damaged=self._book.pages_damaged,
            writes_dropped=dict(self._dropped),
            writes_failed=self._book.writes_failed,
            errors=dict(self._health.errors),
        )

    def close(self, timeout: float = 30.0) -> None:
        """Write what is queued, cancel what is being read, and give the directory to others.

        If the disk stands still, that is given up after about `timeout` seconds; the directory is
        in use until the process ends then.
        """
        self._send_stamps()
        deadline = time.monotonic() + timeout
        are_ended = [
            thread.close(max(0.0, deadline - time.monotonic()))
            for thread in (self._reader, self._writer)
        ]
        if not all(are_ended):
            logger.warning(
                "%s: the disk did not answer for %g s; what was queued is lost.",
                self._directory.path,
                timeout,
            )
            return
        try:
            self._index.close()
        except OSError as error:
            logger.warning("%s: %s", self._directory.path, error.strerror)
        self._segments.close()
        self._io.close()
        self._directory.close()

    def _next_stamp(self) -> int:
        self._stamp += 1
        return self._stamp

    def _send_stamps(self) -> None:
        tree = self._tree
        if self._touched:
            self._writer.set_used(
                [
                    (tree.used[slot], tree.row_id[slot])
                    for slot in self._touched
                    if tree.state[slot] == STORED
                ]
            )
        self._touched.clear()
        self._stamps_due = float("inf")

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"A slot is {slot}; expected 0 to {self.num_slots - 1}.")

    def _check_stored(self, slot: int) -> None:
        self._check_slot(slot)
        if self._tree.state[slot] != STORED:
            raise KeyError(f"Slot {slot} holds no page; poll() has said so.")
