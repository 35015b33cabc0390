"""What is in each slot of the disk tier, and which page may go next."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator

FREE, QUEUED, STORED, DOOMED, DROPPED = range(5)
NONE = -1


class SlotTree:
    """State of slots 0 to num_slots - 1, and the tree of the pages in them.

    A slot is *free*; *queued*: its page is on its way to the disk; *stored*; *doomed*: queued, but
    what it builds on is gone; *dropped*: its page is gone, but somebody is reading the slot still.
    A page has a slot only while its parent has one, so that eviction takes leaves only.

    Args:
        num_slots: how many there are.

    Attributes:
        limit: no slot from here on is given out.
        num_queued: queued and doomed slots.
        num_stored: stored slots.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.limit = num_slots
        self.num_queued = 0
        self.num_stored = 0
        # Plain arrays: a million slots are 50 MB so, and would be several times that as objects.
        self.state = array("b", [FREE]) * num_slots
        self.row_id = array("q", [0]) * num_slots
        self.identity = array("Q", [0]) * num_slots
        self.checksum = array("q", [0]) * num_slots
        self.used = array("q", [0]) * num_slots
        self.parent = array("i", [NONE]) * num_slots
        self._first_child = array("i", [NONE]) * num_slots
        self._next_sibling = array("i", [NONE]) * num_slots
        self._previous_sibling = array("i", [NONE]) * num_slots
        self._pins = array("i", [0]) * num_slots
        self._recycled: list[int] = []  # a heap of free slots below `_num_begun` and the limit
        self._beyond: list[int] = []  # free slots from the limit on
        self._num_begun = 0  # slots from here on were never used
        self._leaves: list[tuple[int, int]] = []  # a heap of (used, slot); some are out of date

    @property
    def num_free(self) -> int:
        """Slots that `take` can give out."""
        return len(self._recycled) + max(0, self.limit - self._num_begun)

    def set_limit(self, limit: int) -> None:
        """Give out no slot from `limit` on."""
        free = self._recycled + self._beyond
        self.limit = limit
        self._recycled = sorted(slot for slot in free if slot < limit)
        self._beyond = [slot for slot in free if slot >= limit]

    def take(self, parent: int, used: int) -> int | None:
        """Queue a page after `parent` (-1: a root has it) in a free slot, the lowest there is."""
        if self._recycled:
            slot = heapq.heappop(self._recycled)
        elif self._num_begun < self.limit:
            slot = self._num_begun
            self._num_begun += 1
        else:
            return None
        self._link(slot, parent)
        self.used[slot] = used
        self.state[slot] = QUEUED
        self.num_queued += 1
        return slot

    def load(self, slot: int, parent: int, used: int) -> None:
        """Enter a page that an earlier process left; call `loaded` after the last."""
        self._link(slot, parent)
        self.used[slot] = used
        self.state[slot] = STORED
        self.num_stored += 1
        self._num_begun = max(self._num_begun, slot + 1)

    def loaded(self) -> None:
        """Make the tree complete after `load`."""
        for slot in range(self._num_begun):
            if self.state[slot] == FREE:
                self._recycled.append(slot)  # ascending, and so a heap
            else:
                self._offer(slot)

    def arrived(self, slot: int) -> bool:
        """The page of a queued slot is on the disk. False: it is doomed, and the slot is free."""
        self.num_queued -= 1
        if self.state[slot] == DOOMED:
            self._free(slot)
            return False
        self.state[slot] = STORED
        self.num_stored += 1
        self._offer(slot)
        return True

    def failed(self, slot: int) -> list[int]:
        """The page of a queued slot did not get to the disk; the slot is free.

        Returns:
            Stored slots that built on it and are so no more.
        """
        self.num_queued -= 1
        gone = [] if self.state[slot] == DOOMED else self._uproot(slot)
        self._free(slot)
        return gone

    def drop(self, slot: int) -> list[int]:
        """The page of a stored slot is gone, and with it all that builds on it.

        Returns:
            Stored slots that are so no more, `slot` among them.
        """
        self.state[slot] = DROPPED
        self.num_stored -= 1
        gone = [slot, *self._uproot(slot)]
        if self._pins[slot] == 0:
            self._free(slot)
        return gone

    def evict(self) -> int | None:
        """Drop the least recently used page that nothing builds on and nobody reads."""
        while self._leaves:
            used, slot = heapq.heappop(self._leaves)
            if used != self.used[slot] or not self._is_leaf(slot):
                continue
            parent = self.parent[slot]
            self.drop(slot)
            if parent != NONE:
                # Using a page uses all that it builds on.
                self.used[parent] = max(self.used[parent], used)
                self._offer(parent)
            return slot
        return None

    def touch(self, slot: int, used: int) -> None:
        """A stored slot has been used; stamps only rise."""
        self.used[slot] = used
        self._offer(slot)

    def pin(self, slot: int) -> None:
        """Keep what is in the slot where it is."""
        self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        """Undo one `pin`."""
        self._pins[slot] -= 1
        if self._pins[slot] == 0:
            if self.state[slot] == DROPPED:
                self._free(slot)
            else:
                self._offer(slot)

    def holds(self, slot: int, row_id: int) -> bool:
        """Whether the page of that row is stored in `slot`."""
        return self.state[slot] == STORED and self.row_id[slot] == row_id

    def can_have_children(self, slot: int) -> bool:
        """Whether a page may be queued after that in `slot`."""
        return self.state[slot] in (QUEUED, STORED)

    def children(self, slot: int) -> Iterator[int]:
        """Slots whose pages come right after that of `slot`."""
        child = self._first_child[slot]
        while child != NONE:
            following = self._next_sibling[child]
            yield child
            child = following

    def _is_leaf(self, slot: int) -> bool:
        return (
            self.state[slot] == STORED and self._first_child[slot] == NONE and not self._pins[slot]
        )

    def _offer(self, slot: int) -> None:
        """Let a slot be evicted when its turn comes, if it can be."""
        if self._is_leaf(slot):
            if len(self._leaves) > 2 * self.num_slots + 64:
                self._leaves = [
                    (self.used[leaf], leaf)
                    for leaf in range(self._num_begun)
                    if self._is_leaf(leaf)
                ]
                heapq.heapify(self._leaves)
            heapq.heappush(self._leaves, (self.used[slot], slot))

    def _free(self, slot: int) -> None:
        """Give a slot back; it has been taken out of the tree."""
        self.state[slot] = FREE
        if slot < self.limit:
            heapq.heappush(self._recycled, slot)
        else:
            self._beyond.append(slot)

    def _uproot(self, slot: int) -> list[int]:
        """Take a page and its descendants out of the tree; the stored ones among the latter."""
        parent = self.parent[slot]
        self._unlink(slot)
        if parent != NONE:
            self._offer(parent)
        gone = []
        order = [slot]
        for current in order:
            order.extend(self.children(current))
        # Each is cut from its parent, so that no slot refers to one that is given out anew.
        for current in order[1:]:
            if self.state[current] == QUEUED:
                self.state[current] = DOOMED
            elif self.state[current] == STORED:
                self.state[current] = DROPPED
                self.num_stored -= 1
                gone.append(current)
        for current in order[1:]:
            self.parent[current] = NONE
            self._next_sibling[current] = self._previous_sibling[current] = NONE
        for current in order:
            self._first_child[current] = NONE
        for current in gone:
            if self._pins[current] == 0:
                self._free(current)
        return gone

    def _link(self, slot: int, parent: int) -> None:
        self.parent[slot] = parent
        if parent == NONE:
            return
        sibling = self._first_child[parent]
        self._next_sibling[slot] = sibling
        if sibling != NONE:
            self._previous_sibling[sibling] = slot
        self._first_child[parent] = slot

    def _unlink(self, slot: int) -> None:
        parent = self.parent[slot]
        following, previous = self._next_sibling[slot], self._previous_sibling[slot]
        if following != NONE:
            self._previous_sibling[following] = previous
        if previous != NONE:
            self._next_sibling[previous] = following
        elif parent != NONE:
            self._first_child[parent] = following
        self.parent[slot] = self._next_sibling[slot] = self._previous_sibling[slot] = NONE
