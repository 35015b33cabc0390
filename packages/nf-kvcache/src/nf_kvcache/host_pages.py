"""Pages on the host: which are in use, and what the others hold."""

from __future__ import annotations

from nf_kvcache.host_tier import HostTier
from nf_kvcache.index import PrefixIndex
from nf_kvcache.prefix_match import Tail
from nf_kvcache.tier import Tier


class HostPages:
    """What the pages of the host hold: KV of a prefix, or the tail of a preempted sequence.

    Args:
        tier: their memory.
        index: which learns of pages that are given to somebody else.

    Attributes:
        tier: as given.
        pool: reference counts; a referenced page is being written or read.
    """

    def __init__(self, tier: HostTier, index: PrefixIndex) -> None:
        self.tier = tier
        self.pool = tier.pool
        self._index = index
        self._nodes: dict[int, int] = {}
        self._tails: dict[str, Tail] = {}
        self._tail_owners: dict[int, str] = {}  # by page
        self.pool.on_evict = self._evict

    def take(self, count: int) -> list[int]:
        """Take up to `count` pages; what they held is forgotten."""
        return self.pool.take(min(count, self.pool.num_free + self.pool.num_idle))

    def release(self, page: int) -> None:
        """Drop a reference; the page is kept if it holds something of use."""
        keep = page in self._nodes or page in self._tail_owners
        self.pool.release([page], keep=(page,) if keep else ())

    def place(self, node: int, page: int) -> None:
        """Say that `page` holds the KV of `node`. If another page does already, that one stays."""
        if self._index.page(node, Tier.HOST) < 0:
            self._index.place(node, Tier.HOST, page)
            self._nodes[page] = node

    def touch(self, node: int) -> None:
        """Count the page of a prefix as the most recently used."""
        page = self._index.page(node, Tier.HOST)
        if page >= 0:
            self.pool.touch(page)

    def keep_tail(self, seq: str, tail: Tail) -> None:
        """Say that a page holds what a preempted sequence has beyond its full pages."""
        self.forget_tail(seq)
        self._tails[seq] = tail
        self._tail_owners[tail.page] = seq
        self._index.hold(tail.node)

    def tail_of(self, seq: str) -> Tail | None:
        """What is kept of a preempted sequence beyond its full pages."""
        return self._tails.get(seq)

    def end_tail(self, page: int) -> None:
        """Forget the tail in `page`, if there is one."""
        if page in self._tail_owners:
            tail = self._tails.pop(self._tail_owners.pop(page))
            self._index.unhold(tail.node)

    def forget_tail(self, seq: str) -> None:
        """Drop the tail of a sequence, if there is one."""
        tail = self._tails.get(seq)
        if tail is not None:
            self.end_tail(tail.page)
            self.pool.discard(tail.page)

    def nodes_held(self) -> list[int]:
        """Nodes of the index that tails keep alive, as often as they do."""
        return [tail.node for tail in self._tails.values()]

    def check_integrity(self) -> None:
        """Compare pages and index.

        Raises:
            RuntimeError: names the page that does not agree.
        """
        self.pool.check_integrity()
        for page, node in self._nodes.items():
            if not self._index.is_alive(node) or self._index.page(node, Tier.HOST) != page:
                raise RuntimeError(
                    f"The KV cache is broken: page {page} of the host is not what its prefix says."
                )

    def _evict(self, page: int) -> None:
        """A page is about to hold something else."""
        node = self._nodes.pop(page, None)
        if node is not None:
            self._index.displace(node, Tier.HOST)
        self.end_tail(page)
