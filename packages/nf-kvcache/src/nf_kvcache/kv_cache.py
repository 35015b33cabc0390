"""The one door to the KV of all sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nf_kvcache.layout import KVLayout
from nf_kvcache.page_pool import PagePool
from nf_kvcache.page_table import PageTable
from nf_kvcache.prefix_index import PrefixIndex, PrefixNode
from nf_kvcache.prefix_match import PrefixMatch
from nf_kvcache.stats import KVCacheStats


class _Entry:
    """A sequence: where its pages are, and how far they are filled and indexed."""

    __slots__ = ("match", "node", "num_tokens", "row", "tail")

    def __init__(self, row: int, node: PrefixNode, match: PrefixMatch) -> None:
        self.row = row
        self.match = match
        self.node = node  # the longest indexed prefix
        self.num_tokens = match.num_tokens  # whose KV is complete
        self.tail = b""  # those of them that do not fill a page yet


class KVCache:
    """Pages of K and V on one device, taken by the sequence and shared by prefix.

    A sequence is a name. It begins with its first `reserve`, which may carry a match, and ends with
    `release`; `preempt` takes its pages until it reserves again. Full pages that were committed can
    be found by later matches, also after their sequence has given them back, until the page is
    needed for something else, least recently used first. A page that a sequence refers to is never
    taken. Partly filled pages are never shared.

    It satisfies `nf_scheduler.PageBudget`. Not thread-safe.

    Args:
        layout: shape of a page.
        num_pages: pages to allocate, `layout.bytes_per_page` each.
        device: where.
        prefix_caching: False finds nothing and keeps nothing.

    Attributes:
        layout: shape of a page.
        num_pages: pages that exist.
        layers: for every layer its K and its V, each [num_pages, num_kv_heads, page_size,
            head_dim]; zero at first. The owner of the cache writes them.

    Raises:
        ValueError: num_pages is below 1.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        *,
        device: str | torch.device = "cpu",
        prefix_caching: bool = True,
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; expected at least 1.")
        self.layout = layout
        self.num_pages = num_pages
        shape = (num_pages, *layout.page_shape)
        self.layers = [
            (
                torch.zeros(shape, dtype=layout.dtype, device=device),
                torch.zeros(shape, dtype=layout.dtype, device=device),
            )
            for _ in range(layout.num_layers)
        ]
        self._prefix_caching = prefix_caching
        self._bytes_per_key = layout.page_size * np.dtype(np.int32).itemsize
        self._index = PrefixIndex()
        self._pool = PagePool(num_pages, on_evict=self._index.forget)
        self._table = PageTable()
        self._entries: dict[str, _Entry] = {}
        self._preempted: set[str] = set()
        self._queried_tokens = 0
        self._hit_tokens = 0

    @property
    def page_size(self) -> int:
        """Token slots in a page."""
        return self.layout.page_size

    def match(self, token_ids: np.ndarray, *, seq: str = "", cache_salt: str = "") -> PrefixMatch:
        """Find the longest prefix of `token_ids` whose KV is here, in whole pages.

        Args:
            token_ids: int32 [n]. To leave a last token to compute, leave it out.
            seq: the sequence that asks; of one that was preempted nothing more is kept than of
                others.
            cache_salt: only the empty one.

        Raises:
            ValueError: for another salt.
        """
        if cache_salt:
            raise ValueError(
                f"cache_salt of sequence {seq!r} is {cache_salt!r}; this cache shares its pages "
                "among all sequences, so leave it empty."
            )
        if not self._prefix_caching:
            return PrefixMatch(0, ())
        tokens = np.asarray(token_ids, dtype=np.int32)
        path = self._index.walk(tokens.tobytes(), self._bytes_per_key)
        return PrefixMatch(
            num_tokens=len(path) * self.page_size,
            pages=tuple(node.page for node in path),
            queried_tokens=len(tokens),
            node=path[-1] if path else None,
        )

    def can_reserve(self, seq: str, num_tokens: int, match: PrefixMatch | None = None) -> bool:
        """Whether `reserve` with the same arguments would find enough pages.

        Raises:
            ValueError: as `reserve`.
        """
        count, shared = self._missing(seq, num_tokens, match)
        return self._pool.can_take(count, shared)

    def reserve(self, seq: str, num_tokens: int, match: PrefixMatch | None = None) -> None:
        """Give `seq` pages for `num_tokens` tokens in total, from its start; never takes any away.

        Args:
            seq: name of the sequence; a new one begins it.
            num_tokens: >= 1.
            match: for a new sequence, its prefix. Its pages become the first of the sequence, and
                its tokens count as committed.

        Raises:
            OutOfPages: there are not enough; nothing has changed.
            ValueError: num_tokens is below 1 or below the match, the match is of no use any more
                because its pages went to others, or comes with a sequence that has begun before.
        """
        count, shared = self._missing(seq, num_tokens, match)
        pages = self._pool.take(count, shared)
        entry = self._entries.get(seq)
        if entry is None:
            node = self._index.root if match is None or match.node is None else match.node
            entry = _Entry(self._table.add_row(), node, match or PrefixMatch(0, ()))
            self._index.hold(node)
            self._entries[seq] = entry
            self._preempted.discard(seq)
            self._table.append(entry.row, list(shared))
            if match is not None:
                self._queried_tokens += match.queried_tokens
                self._hit_tokens += match.num_tokens
        self._table.append(entry.row, pages)

    def restored(self, seq: str) -> PrefixMatch:
        """The match that `seq` was begun with: all of it is on the device.

        Raises:
            KeyError: no such sequence, or it has no pages now.
        """
        return self._entry(seq).match

    def commit(self, seq: str, token_ids: np.ndarray) -> None:
        """Say that the KV of the next tokens of `seq` is complete; full pages can be found then.

        Args:
            seq: name of the sequence.
            token_ids: int32 [n]; they follow those of the match and of earlier commits.

        Raises:
            KeyError: no such sequence.
            ValueError: there are more tokens than room was reserved for; nothing has changed.
        """
        entry = self._entry(seq)
        tokens = np.asarray(token_ids, dtype=np.int32)
        room = self._table.length(entry.row) * self.page_size
        if entry.num_tokens + len(tokens) > room:
            raise ValueError(
                f"commit of {len(tokens)} tokens to sequence {seq!r}, which has filled "
                f"{entry.num_tokens} of {room} token slots; reserve more first."
            )
        first = entry.num_tokens // self.page_size
        entry.num_tokens += len(tokens)
        if not self._prefix_caching:
            return
        step = self._bytes_per_key
        data = entry.tail + tokens.tobytes()
        full = len(data) - len(data) % step
        entry.tail = data[full:]
        if full:
            node = entry.node
            pages = self._table.pages(entry.row, first)
            for start, page in zip(range(0, full, step), pages, strict=False):
                node = self._index.extend(node, data[start : start + step], page)
            self._index.hold(node)
            self._index.unhold(entry.node)
            entry.node = node

    def preempt(self, seq: str) -> None:
        """Take the pages of `seq` until it reserves again. The full ones can still be found.

        Raises:
            KeyError: no such sequence, or it has no pages now.
        """
        self.release(seq)
        self._preempted.add(seq)

    def release(self, seq: str) -> None:
        """End `seq`, preempted or not. Its full pages can still be found until they are needed.

        Raises:
            KeyError: no such sequence; it was released before, or never began.
        """
        if seq in self._preempted:
            self._preempted.remove(seq)
            return
        entry = self._entry(seq)
        del self._entries[seq]
        # The last page first, so that a prefix is not evicted before what builds on it.
        self._pool.release(reversed(self._table.pages(entry.row)), keep=self._index.nodes)
        self._index.unhold(entry.node)
        self._table.remove_row(entry.row)

    def page_tables(self, seqs: Sequence[str], out: np.ndarray | None = None) -> np.ndarray:
        """The pages of each of `seqs`, in order, as attention kernels read them.

        Args:
            seqs: names of n sequences.
            out: int32 [n, width] to write to, with room for the longest; by default a new array
                that is just as wide.

        Returns:
            int32 [n, width]; unused entries are 0.

        Raises:
            KeyError: no such sequence.
            ValueError: `out` does not fit.
        """
        return self._table.gather([self._entry(seq).row for seq in seqs], out)

    def stats(self) -> KVCacheStats:
        """Pages by state, and what happened so far."""
        pool = self._pool
        return KVCacheStats(
            pages_total=pool.num_pages,
            pages_used=pool.num_used,
            pages_cached=pool.num_idle,
            pages_free=pool.num_free,
            queried_tokens=self._queried_tokens,
            hit_tokens=self._hit_tokens,
            evictions=pool.evictions,
        )

    def check_integrity(self) -> None:
        """Compare everything that is kept twice. Costs time linear in the number of pages.

        Raises:
            RuntimeError: names what does not agree.
        """
        self._pool.check_integrity()
        self._index.check_integrity(entry.node for entry in self._entries.values())
        references = [0] * self.num_pages
        for entry in self._entries.values():
            for page in self._table.pages(entry.row):
                references[page] += 1
        for page, count in enumerate(references):
            if count != self._pool.references(page):
                raise RuntimeError(
                    f"The KV cache is broken: page {page} is in {count} sequences, but has "
                    f"{self._pool.references(page)} references."
                )
            if self._pool.is_idle(page) and page not in self._index.nodes:
                raise RuntimeError(
                    f"The KV cache is broken: page {page} is kept, but cannot be found."
                )

    def _entry(self, seq: str) -> _Entry:
        """The state of a sequence that has begun."""
        entry = self._entries.get(seq)
        if entry is None:
            raise KeyError(
                f"No sequence {seq!r}: it was released before, or never reserved a page."
            )
        return entry

    def _missing(
        self, seq: str, num_tokens: int, match: PrefixMatch | None
    ) -> tuple[int, tuple[int, ...]]:
        """Pages that `seq` lacks for `num_tokens`, besides those that `match` brings."""
        if num_tokens < 1:
            raise ValueError(
                f"num_tokens of sequence {seq!r} is {num_tokens}; expected at least 1."
            )
        entry = self._entries.get(seq)
        shared: tuple[int, ...] = ()
        if match is not None:
            if entry is not None:
                raise ValueError(
                    f"A match came with sequence {seq!r}, which has begun before; only the first "
                    "reserve of a sequence can take one."
                )
            if match.num_tokens > num_tokens:
                raise ValueError(
                    f"num_tokens of sequence {seq!r} is {num_tokens}, and its match has "
                    f"{match.num_tokens} already."
                )
            if not match.is_valid:
                raise ValueError(
                    f"The match for sequence {seq!r} is out of date: its pages hold something else "
                    "now. Match again just before you reserve."
                )
            shared = match.pages
        held = len(shared) if entry is None else self._table.length(entry.row)
        return max(0, -(-num_tokens // self.page_size) - held), shared
