"""Which prefixes have a copy on disk, and which are on their way there."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nf_kvcache.disk_store import DiskStore
from nf_kvcache.host_pages import HostPages
from nf_kvcache.index import PrefixIndex
from nf_kvcache.tier import Tier


class DiskCopies:
    """Brings pages from the host to the disk, parents first, as fast as the disk takes them.

    Pages that it does not take at once wait. They keep no page of the host for that: one that goes
    to somebody else meanwhile is not written, and counted.

    Args:
        disk: takes the pages.
        index: of all tiers. What an earlier process has left on disk is entered into it.
        host: where the pages come from.

    Attributes:
        disk: as given.
        unwritten_pages: counter of pages that left the host before the disk could take them.
    """

    def __init__(self, disk: DiskStore, index: PrefixIndex, host: HostPages) -> None:
        self.disk = disk
        self.unwritten_pages = 0
        self._index = index
        self._host = host
        self._nodes: dict[int, int] = {}  # by slot
        self._writes: dict[int, int] = {}  # by slot: the page of the host that it is written from
        self._backlog: deque[tuple[int, bytes]] = deque()  # node, salt of its root
        for stored in disk.pages():
            above = (
                index.root(stored.salt)
                if stored.parent_slot < 0
                else self._nodes[stored.parent_slot]
            )
            node = index.extend(above, stored.tokens)
            index.place(node, Tier.DISK, stored.slot)
            self._nodes[stored.slot] = node

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not (self._writes or self._backlog)

    def add(self, node: int, salt: bytes) -> None:
        """Have a page of the host written, after those before it that are missing on disk."""
        if len(self._backlog) >= self._host.pool.num_pages:  # the disk stands still
            self._index.unhold(self._backlog.popleft()[0])
            self.unwritten_pages += 1
        self._index.hold(node)
        self._backlog.append((node, salt))
        self._write_backlog()

    def poll(self) -> None:
        """Take notice of what the disk has done since the last call, and give it more to do."""
        events = self.disk.poll()
        for slot in events.written:
            self._host.release(self._writes.pop(slot))
        for slot in events.failed:
            self._host.release(self._writes.pop(slot))
            self._forget(slot)
        for slot in events.evicted:
            self._forget(slot)
        self._write_backlog()

    def touch(self, nodes: Sequence[int]) -> None:
        """Count the pages of a path as used now."""
        slots = [self._index.page(node, Tier.DISK) for node in nodes]
        self.disk.touch([slot for slot in slots if slot >= 0 and slot not in self._writes])

    def nodes_held(self) -> list[int]:
        """Nodes of the index that are kept alive, as often as they are."""
        return [node for node, _ in self._backlog]

    def check_integrity(self) -> None:
        """Compare slots and index.

        Raises:
            RuntimeError: names the slot that does not agree.
        """
        for slot, node in self._nodes.items():
            if not self._index.is_alive(node) or self._index.page(node, Tier.DISK) != slot:
                raise RuntimeError(
                    f"The KV cache is broken: slot {slot} of the disk is not what its prefix says."
                )

    def _write_backlog(self) -> None:
        while self._backlog and not self.disk.is_busy:
            node, salt = self._backlog[0]
            if not self._write(node, salt):
                return
            self._backlog.popleft()
            self._index.unhold(node)

    def _write(self, node: int, salt: bytes) -> bool:
        """Queue a page, and those before it; False if the disk has no time for all of them."""
        path: list[tuple[int, int]] = []
        top = node
        while (above := self._index.parent(top)) and self._index.page(top, Tier.DISK) < 0:
            page = self._index.page(top, Tier.HOST)
            if page < 0:
                self.unwritten_pages += 1
                return True
            path.append((top, page))
            top = above
        slot = self._index.page(top, Tier.DISK) if above else -1
        for node, page in reversed(path):
            if self.disk.is_busy:
                return False
            data = self._host.tier.slot(page)
            written = self.disk.write(slot, salt, self._index.tokens(node), data)
            if written is None:  # which the disk counts
                return True
            slot = written
            self._host.pool.hold([page])
            self._writes[slot] = page
            self._index.place(node, Tier.DISK, slot)
            self._nodes[slot] = node
        return True

    def _forget(self, slot: int) -> None:
        """A slot holds its page no more."""
        self._index.displace(self._nodes.pop(slot), Tier.DISK)
