"""What becomes of pages on the disk, as the owner of the tier gets to know it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nf_kvcache.disk.completions import (
    Completion,
    NoSpace,
    PagesLost,
    ReadEnded,
    SegmentLost,
    Trouble,
    WriteEnded,
)
from nf_kvcache.disk.health import DiskHealth
from nf_kvcache.disk.segments import Segments
from nf_kvcache.disk.slot_tree import STORED, SlotTree

logger = logging.getLogger("nf_kvcache.disk")


class DiskEvents(NamedTuple):
    """What happened to slots since the last `poll`; each slot is in one list, once.

    Attributes:
        written: their pages are on the disk and can be read.
        failed: their pages are not; the slots are free.
        evicted: they hold their pages no more: least recently used, damaged, or deleted.
    """

    written: list[int]
    failed: list[int]
    evicted: list[int]


class PageBook:
    """Keeps the tree of slots true to what the threads report.

    Args:
        path: what log lines call the cache.
        tree: the slots.
        segments: where they are.
        health: what is told of errors.
        forget: called with rows that have to leave the index before their slots are written again.

    Attributes:
        writes_failed: pages that were queued and are not on the disk.
        evictions: pages that gave way to others.
        pages_damaged: pages dropped because they, or what they build on, are not intact.
    """

    def __init__(
        self,
        path: Path,
        tree: SlotTree,
        segments: Segments,
        health: DiskHealth,
        forget: Callable[[Sequence[int]], None],
    ) -> None:
        self.writes_failed = 0
        self.evictions = 0
        self.pages_damaged = 0
        self._path = path
        self._tree = tree
        self._segments = segments
        self._health = health
        self._forget = forget
        self._written: dict[int, None] = {}  # an ordered set
        self._failed: list[int] = []
        self._evicted: list[int] = []

    def note(self, completion: Completion) -> None:
        """Take note of what a thread reports."""
        match completion:
            case WriteEnded():
                self._end_write(completion)
            case ReadEnded(read, damaged):
                if damaged is not None:
                    self._drop([damaged])
                for slot in read.slots:
                    self._tree.unpin(slot)
            case PagesLost(pages):
                self._drop(pages)
            case SegmentLost(segment):
                self._lose(segment)
            case NoSpace(segment):
                self._make_do(segment)
            case Trouble(error, message):
                self._health.trouble(error, message)

    def make_room(self, num_slots: int) -> None:
        """Evict until so many slots are free, as far as possible."""
        if self._health.may_grow_again():
            self._tree.set_limit(self._tree.num_slots)
        while self._tree.num_free < num_slots:
            slot = self._tree.evict()
            if slot is None:
                return
            self.evictions += 1
            self._vacate([slot])

    def take_events(self) -> DiskEvents:
        """What happened since the last call."""
        events = DiskEvents(list(self._written), self._failed, self._evicted)
        self._written, self._failed, self._evicted = {}, [], []
        return events

    def _end_write(self, end: WriteEnded) -> None:
        slot, tree = end.slot, self._tree
        row_id = tree.row_id[slot]
        if end.error == 0:
            self._health.success()
            if tree.arrived(slot):
                tree.checksum[slot] = end.checksum
                self._written[slot] = None
                return
            self._forget([row_id])  # what it builds on has gone meanwhile
        else:
            if end.error == errno.ENOSPC and slot >= tree.limit:
                pass  # counted once, with its segment
            elif end.error != errno.ECANCELED:
                self._health.trouble(end.error, "a page cannot be written")
            self._damage(tree.failed(slot))
        self.writes_failed += 1
        self._failed.append(slot)

    def _lose(self, segment: int) -> None:
        tree = self._tree
        pages = [
            (slot, tree.row_id[slot])
            for slot in self._segments.slots_of(segment)
            if tree.state[slot] == STORED
        ]
        if not pages:
            return  # several threads have noticed
        logger.warning(
            "%s: the file of segment %d was deleted, and %d pages with it.",
            self._path,
            segment,
            len(pages),
        )
        self._health.count(errno.ENOENT)
        self._drop(pages)

    def _make_do(self, segment: int) -> None:
        """Go on with the segments that there are, if they are the first ones."""
        tree = self._tree
        start = self._segments.slots_of(segment).start
        beyond = range(start, tree.num_slots)
        if start > 0 and all(tree.state[slot] != STORED for slot in beyond):
            tree.set_limit(min(tree.limit, start))
            self._health.full(tree.limit)

    def _drop(self, pages: Sequence[tuple[int, int]]) -> None:
        """Drop those of (slot, row) that are still stored, with all that builds on them."""
        for slot, row_id in pages:
            if self._tree.holds(slot, row_id):
                self._damage(self._tree.drop(slot))

    def _damage(self, slots: Sequence[int]) -> None:
        self.pages_damaged += len(slots)
        self._vacate(slots)

    def _vacate(self, slots: Sequence[int]) -> None:
        """These hold nothing any more: tell the index and the owner."""
        if slots:
            self._forget([self._tree.row_id[slot] for slot in slots])
        for slot in slots:
            if slot in self._written:  # the owner does not know yet that it was ever there
                del self._written[slot]
                self._failed.append(slot)
            else:
                self._evicted.append(slot)
