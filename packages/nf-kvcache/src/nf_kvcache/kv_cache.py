"""The one door to the KV of all sequences."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from nf_kvcache.copier import Copier, Event, Layer, make_copier
from nf_kvcache.device_pages import DevicePages
from nf_kvcache.disk_store import DiskStore
from nf_kvcache.host_tier import HostTier
from nf_kvcache.index import make_index
from nf_kvcache.layout import KVLayout
from nf_kvcache.lower_tiers import LowerTiers
from nf_kvcache.offload import IterationOffload
from nf_kvcache.page_table import PageTable
from nf_kvcache.prefix_match import PrefixMatch
from nf_kvcache.prefix_restores import PrefixRestores
from nf_kvcache.sequence import NO_TOKENS, CachedSequence
from nf_kvcache.stats import KVCacheStats
from nf_kvcache.tier import Tier


class KVCache:
    """Pages of K and V on a device, taken by the sequence, shared by prefix, kept in lower tiers.

    A sequence is a name. It begins with its first `reserve`, which may carry a match, and ends with
    `release`; in between, `preempt` takes its pages until the next `reserve`. Full pages that were
    committed can be found by later matches, also after their sequence has ended, until the page is
    needed for something else, least recently used first; with lower tiers, even then. A page that a
    sequence refers to is never taken. Partly filled pages are shared by `fork` alone.

    It satisfies `nf_scheduler.PageBudget`. Not thread-safe.

    Args:
        layout: shape of a page.
        num_pages: pages of the device to allocate, `layout.bytes_per_page` each.
        device: where.
        prefix_caching: False finds nothing and keeps nothing.
        host_bytes: bound of the host tier; 0 for none.
        disk: a disk tier for pages of the same shape; needs a host tier, through which its pages
            go. `close` closes it.
        copier: between device and host; by default one that torch does.
        spare_pages: pages of the device behind these that no sequence is given, for the owner.
        watch: is given each event whose state the cache will ask for, and gives what it asks
            instead. With the answers of clock and disk, those decide all that the cache does.
        restore_seconds: after which a page that has not come up is computed instead.
        native_index: False keeps the prefix index in plain Python.
        clock: seconds.

    Attributes:
        layout: shape of a page.
        num_pages: pages of the device.
        restore_seconds: as given.
        layers: for every layer its K and its V, each [num_pages + spare_pages, num_kv_heads,
            page_size, head_dim]; zero at first. The owner of the cache writes them.

    Raises:
        ValueError: num_pages is below 1, there is a disk tier without a host tier or for other
            pages, or tiers below a cache that keeps nothing.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        *,
        device: str | torch.device = "cpu",
        prefix_caching: bool = True,
        host_bytes: int = 0,
        disk: DiskStore | None = None,
        copier: Copier | None = None,
        spare_pages: int = 0,
        watch: Callable[[Event], Event] | None = None,
        restore_seconds: float = 2.0,
        native_index: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; expected at least 1.")
        _check_tiers(layout, host_bytes, disk, prefix_caching)
        device = torch.device(device)
        self.layout = layout
        self.num_pages = num_pages
        self.restore_seconds = restore_seconds
        self._prefix_caching = prefix_caching
        self._index = make_index(layout.page_size, native=native_index)
        self._device = DevicePages(layout, num_pages, spare_pages, device, self._index)
        self._table = PageTable()
        self._entries: dict[str, CachedSequence] = {}
        self._preempted: set[str] = set()
        self._queried_tokens = 0
        self._hit_tokens = dict.fromkeys(Tier, 0)
        self._copier = copier or make_copier(device)
        self._lower: LowerTiers | None = None
        if host_bytes:
            self._lower = LowerTiers(
                self._device,
                self._index,
                HostTier(layout, host_bytes, device=device),
                disk,
                self._copier,
                watch=watch or (lambda event: event),
                restore_seconds=restore_seconds,
                clock=clock,
            )
        self._restores = PrefixRestores(
            self._device, self._index, self._table, self._lower, layout.page_size
        )

    @property
    def page_size(self) -> int:
        """Token slots in a page."""
        return self.layout.page_size

    @property
    def layers(self) -> list[Layer]:
        """K and V of every layer."""
        return self._device.layers

    @property
    def num_available(self) -> int:
        """Pages of the device that no sequence refers to."""
        return self._device.pool.num_free + self._device.pool.num_idle

    def match(self, token_ids: np.ndarray, *, seq: str = "", cache_salt: str = "") -> PrefixMatch:
        """Find the longest prefix of `token_ids` whose KV exists in any tier.

        Args:
            token_ids: int32 [n]. To leave a last token to compute, leave it out.
            seq: name of a preempted sequence to go on with: what was kept of its last, partly
                filled page counts too. All else is found in whole pages.
            cache_salt: whose KV to look at; sequences with different salts share nothing.
        """
        if not self._prefix_caching:
            return PrefixMatch()
        tokens = np.ascontiguousarray(token_ids, dtype=np.int32)
        tail = None
        if self._lower is not None:
            self._lower.poll()
            tail = self._lower.tail_of(seq) if seq else None
        nodes, pages = self._index.walk(salt_digest(cache_salt), tokens)
        num_tokens = len(nodes) * self.page_size
        if tail is not None:
            last = int(nodes[-1]) if len(nodes) else self._index.root(salt_digest(cache_salt))
            rest = tokens[num_tokens : num_tokens + len(tail.tokens)]
            if tail.node != last or not np.array_equal(tail.tokens, rest):
                tail = None
            else:
                num_tokens += len(rest)
        return PrefixMatch(num_tokens, len(tokens), nodes, pages, tail, salt_digest(cache_salt))

    def can_reserve(self, seq: str, num_tokens: int, match: PrefixMatch | None = None) -> bool:
        """Whether `reserve` with the same arguments would find enough pages.

        Raises:
            ValueError: as `reserve`.
        """
        count, shared = self._missing(seq, num_tokens, match)
        return self._device.pool.can_take(count, shared)

    def reserve(self, seq: str, num_tokens: int, match: PrefixMatch | None = None) -> None:
        """Give `seq` pages for `num_tokens` tokens in total, from its start; never takes any away.

        Pages of the match that are in a lower tier begin their way up; `restored` says when they
        have come. What is written next to a page shared by `fork` is written to a page of its own.

        Args:
            seq: name of the sequence; a new one begins it.
            num_tokens: >= 1.
            match: for a new sequence, its prefix. Its pages become the first of the sequence, and
                its tokens count as committed once they are on the device.

        Raises:
            OutOfPages: there are not enough; nothing has changed.
            ValueError: num_tokens is below 1 or below the match, the match is of no use any more
                because its pages went to others, or comes with a sequence that has begun before.
        """
        count, shared = self._missing(seq, num_tokens, match)
        pages = self._device.pool.take(count, shared)
        entry = self._entries.get(seq)
        if entry is None:
            self._begin(seq, match or PrefixMatch(), pages)
        elif entry.forked:
            self._unshare(entry, pages)  # takes those that it needs
            self._table.append(entry.row, pages)
        else:
            self._table.append(entry.row, pages)

    def grow(self, seqs: Sequence[str]) -> None:
        """Give each of some sequences one more page, as `reserve` would, but all at once.

        Raises:
            OutOfPages: there are not enough; nothing has changed.
            KeyError: no such sequence; nothing has changed.
        """
        entries = self._entries_of(seqs)
        pool = self._device.pool
        forked = [entry for entry in entries if entry.forked]
        pages = pool.take(len(entries) + sum(len(self._shared_open(entry)) for entry in forked))
        for entry in forked:
            self._unshare(entry, pages)  # takes those that it needs
        # When one of two has got a page of its own, the other one needs none any more.
        pool.release(pages[len(entries) :], keep=())
        del pages[len(entries) :]
        rows = np.array([entry.row for entry in entries], dtype=np.intp)
        self._table.append_one(rows, pages)

    def restored(self, seq: str) -> PrefixMatch | None:
        """What has come of the match that `seq` began with.

        Returns:
            None while some of it is on its way up. Else the match; or less of it, if a page was
            damaged or too late. Then the tokens behind have to be computed.

        Raises:
            KeyError: no such sequence.
        """
        entry = self._entry(seq)
        if not entry.restores:
            return entry.match
        if self._lower is not None:
            self._lower.poll()
        if not all(restore.ended for restore in entry.restores):
            return None
        match = self._restores.end(seq, entry)
        if match is not None:
            self._count(match)
        return match

    def poll(self) -> bool:
        """Let what is on its way between the tiers go on.

        Other methods do so as well; an owner that has nothing else to call goes on calling this.

        Returns:
            Whether something is under way still.
        """
        if self._lower is None:
            return False
        self._lower.poll()
        return not self._lower.is_idle

    def wait(self, timeout: float) -> None:
        """Wait until some restore has come further, `timeout` seconds at most."""
        if self._lower is not None:
            self._lower.wait(timeout)

    def commit(self, seq: str, token_ids: np.ndarray) -> None:
        """Say that the KV of the next tokens of `seq` is complete; full pages can be found then.

        Args:
            seq: name of the sequence.
            token_ids: int32 [n]; they follow those of the match and of earlier commits.

        Raises:
            KeyError: no such sequence.
            ValueError: there are more tokens than room was reserved for, or its match is still on
                the way up; nothing has changed.
        """
        entry = self._entry(seq)
        tokens = np.asarray(token_ids, dtype=np.int32)
        page_size = self.layout.page_size
        room = self._table.length(entry.row) * page_size
        if entry.num_tokens + len(tokens) > room:
            raise ValueError(
                f"commit of {len(tokens)} tokens to sequence {seq!r}, which has filled "
                f"{entry.num_tokens} of {room} token slots; reserve more first."
            )
        if entry.restores:
            raise ValueError(
                f"commit to sequence {seq!r}, whose prefix is on its way up; wait until restored() "
                "gives a match."
            )
        first = entry.num_tokens // page_size
        entry.num_tokens += len(tokens)
        data = np.concatenate((entry.tail, tokens)) if len(entry.tail) else tokens
        full, rest = divmod(len(data), page_size)
        entry.tail = data[-rest:] if rest else NO_TOKENS
        if full and self._prefix_caching:
            self._index_pages(entry, first, data, full)

    def _index_pages(
        self, entry: CachedSequence, first: int, tokens: np.ndarray, count: int
    ) -> None:
        """Let pages of a sequence be found.

        Args:
            entry: the sequence.
            first: position of the first of these pages.
            tokens: int32, what is in them; those of the first that is not full come last.
            count: of full pages.
        """
        node, page_size = entry.node, self.layout.page_size
        for i, page in enumerate(self._table.pages(entry.row, first, first + count)):
            node = self._index.extend(node, tokens[i * page_size : (i + 1) * page_size])
            self._device.place(node, page)
            if entry.arrivals:
                arrival = entry.arrivals.pop(first + i, None)
                if arrival is not None and self._lower is not None:
                    self._lower.expect(arrival, node, entry.salt)
        entry.move(self._index, node)

    def commit_pages(self, seqs: Sequence[str], token_ids: np.ndarray) -> None:
        """Say that one more page of each of some sequences is complete: `commit`, but all at once.

        Args:
            seqs: names of n sequences, each with only full pages committed so far.
            token_ids: int32 [n, page_size], what is in the page of each.

        Raises:
            KeyError, ValueError: as `commit`, or a page that was committed in part; nothing has
                changed.
        """
        page_size = self.layout.page_size
        tokens = np.ascontiguousarray(token_ids, dtype=np.int32)
        if tokens.shape != (len(seqs), page_size):
            raise ValueError(
                f"token_ids has shape {tokens.shape}; expected ({len(seqs)}, {page_size})."
            )
        entries = self._entries_of(seqs)
        rows = np.array([entry.row for entry in entries], dtype=np.intp)
        positions = np.array([entry.num_tokens for entry in entries], dtype=np.intp) // page_size
        has_page = (positions < self._table.lengths(rows)).tolist()
        for entry, seq, fits in zip(entries, seqs, has_page, strict=True):
            if not fits or len(entry.tail) or entry.restores:
                raise ValueError(
                    f"commit of a page to sequence {seq!r}, which has no such page, has filled a "
                    "part of it, or waits for its prefix; use commit."
                )
        nodes = np.array([entry.node for entry in entries], dtype=np.int64)
        if self._prefix_caching:
            pages = self._table.at(rows, positions)
            nodes, placed = self._index.advance(
                nodes,
                tokens.reshape(-1),
                Tier.DEVICE,
                pages,
            )
            self._device.placed(nodes[placed], pages[placed])
        for entry, node in zip(entries, nodes.tolist(), strict=True):
            entry.node = node
            entry.num_tokens += page_size
        if self._lower is not None:
            for entry, position in zip(entries, positions.tolist(), strict=True):
                arrival = entry.arrivals.pop(position, None)
                if arrival is not None:
                    self._lower.expect(arrival, entry.node, entry.salt)

    def begin_iteration(
        self, seqs: Sequence[str], context_lens: np.ndarray, new_lens: np.ndarray
    ) -> IterationOffload | None:
        """Prepare to copy the pages that an iteration fills to the host, layer by layer.

        Args:
            seqs: names of n sequences.
            context_lens: int32 [n], tokens before the iteration.
            new_lens: int32 [n], tokens that the iteration computes.

        Returns:
            What to call around the writes to each layer, whether a page becomes full or not; None
            without lower tiers.
        """
        if self._lower is None:
            return None
        starts = np.asarray(context_lens) // self.page_size
        stops = (np.asarray(context_lens) + new_lens) // self.page_size
        places: list[tuple[CachedSequence, int]] = []
        pages: list[int] = []
        for i in np.flatnonzero(stops > starts).tolist():
            entry = self._entry(seqs[i])
            start, stop = int(starts[i]), int(stops[i])
            pages += self._table.pages(entry.row, start)[: stop - start]
            places += [(entry, position) for position in range(start, stop)]
        offload, arrivals = self._lower.begin_iteration(pages)
        for (entry, position), arrival in zip(places, arrivals, strict=False):
            entry.arrivals[position] = arrival
        return offload

    def fork(self, parent: str, child: str, num_tokens: int | None = None) -> None:
        """Begin `child` with what `parent` has committed, a partly filled last page included.

        Both go on with `reserve` before they write; whoever is first gets a page of its own then.

        Args:
            parent: name of the sequence to begin with.
            child: name of the new one.
            num_tokens: how many of the first tokens; by default all that were committed.

        Raises:
            KeyError: no such parent.
            ValueError: the child has begun before, the parent waits for a restore, or has not
                committed so many tokens.
        """
        source = self._entry(parent)
        if child in self._entries or child in self._preempted:
            raise ValueError(f"fork to sequence {child!r}, which has begun before.")
        if source.restores:
            raise ValueError(f"fork of sequence {parent!r}, whose prefix is on its way up.")
        if num_tokens is None:
            num_tokens = source.num_tokens
        elif not 0 <= num_tokens <= source.num_tokens:
            raise ValueError(
                f"fork of {num_tokens} tokens of sequence {parent!r}, which has committed "
                f"{source.num_tokens}."
            )
        pages = self._table.pages(source.row)[: -(-num_tokens // self.page_size)]
        self._device.pool.hold(pages)
        node, tail = self._prefix_of(source, num_tokens)
        entry = CachedSequence(self._table.add_row(), node, source.salt, PrefixMatch())
        entry.num_tokens, entry.tail = num_tokens, tail
        entry.forked = source.forked = True
        self._index.hold(entry.node)
        self._table.append(entry.row, pages)
        self._entries[child] = entry

    def release(self, seq: str) -> None:
        """End `seq`, preempted or not. Its full pages can still be found until they are needed.

        Raises:
            KeyError: no such sequence; it was released before, or never began.
        """
        if seq in self._preempted:
            self._preempted.remove(seq)
            if self._lower is not None:
                self._lower.forget_preempted(seq)
            return
        self._vacate(seq)

    def preempt(self, seq: str) -> None:
        """Take the pages of `seq`: what it has committed goes to the host, where there is one.

        A later match that names `seq` finds it there, its partly filled last page included, unless
        the host needed the room for something else.

        Raises:
            KeyError: no such sequence.
        """
        entry = self._entry(seq)
        if self._lower is not None and not entry.restores:
            pages = self._table.pages(entry.row)
            full = entry.num_tokens // self.page_size
            path = []
            node = entry.node
            for position in range(full - 1, -1, -1):
                path.append((node, pages[position]))
                node = self._index.parent(node)
            path.reverse()
            page = pages[full] if len(entry.tail) else -1
            tail = (entry.node, page, entry.tail)
            self._lower.keep_preempted(seq, path, entry.salt, tail)
        self._vacate(seq)
        self._preempted.add(seq)

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
        rows = [entry.row for entry in self._entries_of(seqs)]
        return self._table.gather(np.array(rows, dtype=np.intp), out)

    def stats(self) -> KVCacheStats:
        """Pages by tier and state, and what happened so far."""
        pool = self._device.pool
        return KVCacheStats(
            pages_total=pool.num_pages,
            pages_used=pool.num_used,
            pages_cached=pool.num_idle,
            pages_free=pool.num_free,
            queried_tokens=self._queried_tokens,
            hit_tokens=sum(self._hit_tokens.values()),
            evictions=pool.evictions,
            hit_tokens_by_tier={tier.label: count for tier, count in self._hit_tokens.items()},
            lower=None if self._lower is None else self._lower.stats(),
        )

    def flush(self, timeout: float) -> bool:
        """Wait until everything that is on its way down has come; False if that takes too long."""
        return self._lower is None or self._lower.flush(timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Write what is on its way down, `timeout` seconds at most, and end the lower tiers."""
        if self._lower is not None:
            self._lower.close(timeout)
        self._copier.close()

    def check_integrity(self) -> None:
        """Compare everything that is kept twice. Costs time linear in the number of pages.

        Raises:
            RuntimeError: names what does not agree.
        """
        self._index.check_integrity()
        self._device.check_integrity()
        references = [0] * self.num_pages
        holders: Counter[int] = Counter()
        for entry in self._entries.values():
            holders[entry.node] += 1
            for page in self._table.pages(entry.row):
                references[page] += 1
        if self._lower is not None:
            self._lower.check_integrity()
            for page in self._lower.device_pages_held():
                references[page] += 1
            holders.update(self._lower.nodes_held())
        for node in self._index.nodes().tolist():
            if self._index.holders(node) != holders[node]:
                raise RuntimeError(
                    f"The KV cache is broken: a prefix has {holders[node]} holders, but counts "
                    f"{self._index.holders(node)}."
                )
        for page, count in enumerate(references):
            if count != self._device.pool.references(page):
                raise RuntimeError(
                    f"The KV cache is broken: page {page} has {count} holders, but "
                    f"{self._device.pool.references(page)} references."
                )

    def _entry(self, seq: str) -> CachedSequence:
        """The state of a sequence that has begun."""
        entry = self._entries.get(seq)
        if entry is None:
            raise KeyError(
                f"No sequence {seq!r}: it was released before, or never reserved a page."
            )
        return entry

    def _entries_of(self, seqs: Sequence[str]) -> list[CachedSequence]:
        """The states of sequences that have begun."""
        entries = self._entries
        try:
            return [entries[seq] for seq in seqs]
        except KeyError as error:
            self._entry(error.args[0])  # which says what is wrong
            raise

    def _vacate(self, seq: str) -> None:
        """Take all pages of `seq`."""
        entry = self._entry(seq)
        del self._entries[seq]
        for restore in entry.restores:
            restore.waiters.discard(seq)
        if self._lower is not None:
            for arrival in entry.arrivals.values():
                self._lower.expect(arrival)
            self._lower.poll()
        # The last page first, so that a prefix is not evicted before what builds on it.
        self._device.pool.release(reversed(self._table.pages(entry.row)), keep=self._device.nodes)
        self._index.unhold(entry.node)
        self._table.remove_row(entry.row)

    def _prefix_of(self, entry: CachedSequence, num_tokens: int) -> tuple[int, np.ndarray]:
        """The node of the full pages of some first tokens, and the tokens after these."""
        rest = num_tokens % self.page_size
        if not self._prefix_caching:  # then nothing is indexed, and only the number counts
            return entry.node, np.zeros(rest, dtype=np.int32)
        node, tail = entry.node, entry.tail
        for _ in range(entry.num_tokens // self.page_size - num_tokens // self.page_size):
            tail = self._index.tokens(node)
            node = self._index.parent(node)
        return node, tail[:rest]

    def _missing(
        self, seq: str, num_tokens: int, match: PrefixMatch | None
    ) -> tuple[int, list[int]]:
        """Pages that `seq` lacks for `num_tokens`, besides those of the match on the device."""
        if num_tokens < 1:
            raise ValueError(
                f"num_tokens of sequence {seq!r} is {num_tokens}; expected at least 1."
            )
        entry = self._entries.get(seq)
        wanted = -(-num_tokens // self.page_size)
        if match is None or entry is not None:
            if match is not None:
                raise ValueError(
                    f"A match came with sequence {seq!r}, which has begun before; only the first "
                    "reserve of a sequence can take one."
                )
            held = 0 if entry is None else self._table.length(entry.row)
            shared = 0 if entry is None or not entry.forked else len(self._shared_open(entry))
            return max(0, wanted - held) + shared, []
        if match.num_tokens > num_tokens:
            raise ValueError(
                f"num_tokens of sequence {seq!r} is {num_tokens}, and its match has "
                f"{match.num_tokens} already."
            )
        self._require_valid(seq, match)
        shared_pages = [page for page in self._restores.pages_there(match) if page >= 0]
        return wanted - len(shared_pages), shared_pages

    def _require_valid(self, seq: str, match: PrefixMatch) -> None:
        """Refuse a match whose pages went to others."""
        tiers = match.tiers
        for tier in Tier:
            there = tiers == tier
            if not self._index.holds(match.nodes[there], tier, match.pages[there, tier]):
                raise ValueError(
                    f"The match for sequence {seq!r} is out of date: its pages hold something else "
                    "now. Match again just before you reserve."
                )

    def _begin(self, seq: str, match: PrefixMatch, fresh: list[int]) -> None:
        """Make the entry of a new sequence; start what its match needs."""
        node = int(match.nodes[-1]) if len(match.nodes) else self._index.root(match.salt)
        entry = CachedSequence(self._table.add_row(), node, match.salt, match)
        self._index.hold(node)
        self._entries[seq] = entry
        self._preempted.discard(seq)
        self._restores.begin(seq, entry, fresh)
        if self._lower is not None:
            self._lower.touch(match.nodes.tolist())
        if not entry.restores:
            self._count(match)
            entry.num_tokens = match.num_tokens

    def _shared_open(self, entry: CachedSequence) -> list[int]:
        """Positions of pages that are not full and that another sequence refers to as well."""
        first = entry.num_tokens // self.page_size
        return [
            first + i
            for i, page in enumerate(self._table.pages(entry.row, first))
            if self._device.pool.references(page) > 1
        ]

    def _unshare(self, entry: CachedSequence, fresh: list[int]) -> None:
        """Replace pages that are shared while they are not full by copies; takes from `fresh`."""
        if self._lower is not None:
            self._lower.hold_all()
        for position in self._shared_open(entry):
            page, copy = self._table.pages(entry.row)[position], fresh.pop()
            self._copier.duplicate(self._device.layers, page, copy)
            self._table.replace(entry.row, position, copy)
            self._device.pool.release([page], keep=self._device.nodes)
        entry.forked = False

    def _count(self, match: PrefixMatch) -> None:
        """Count the hits of a match that a sequence begins with."""
        self._queried_tokens += match.queried_tokens
        for label, count in match.tokens_by_tier.items():
            self._hit_tokens[Tier[label.upper()]] += count


def _check_tiers(
    layout: KVLayout, host_bytes: int, disk: DiskStore | None, prefix_caching: bool
) -> None:
    """Refuse lower tiers that do not fit together."""
    if host_bytes < 0:
        raise ValueError(f"host_bytes is {host_bytes}; expected 0 or more.")
    if disk is not None and not host_bytes:
        raise ValueError(
            "host_bytes is 0, and there is a disk tier, whose pages go through the host; give "
            "the host tier some memory."
        )
    if host_bytes and not prefix_caching:
        raise ValueError(
            "prefix_caching is False and host_bytes is not 0: lower tiers keep prefixes. Leave "
            "one of them off."
        )
    if disk is not None and (disk.page_bytes, disk.page_size) != (
        layout.bytes_per_page,
        layout.page_size,
    ):
        raise ValueError(
            f"disk has pages of {disk.page_bytes} bytes and {disk.page_size} tokens; expected "
            f"{layout.bytes_per_page} bytes and {layout.page_size} tokens, as in layout."
        )


def salt_digest(cache_salt: str) -> bytes:
    """What of a salt goes into the index and to the disk: nobody can read the salt from it."""
    return hashlib.sha256(cache_salt.encode()).digest()[:16] if cache_salt else b""
