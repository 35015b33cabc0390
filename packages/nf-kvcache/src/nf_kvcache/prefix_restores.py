"""Pages of a match become pages of a sequence, wherever they are."""

from __future__ import annotations

from nf_kvcache.device_pages import DevicePages
from nf_kvcache.index import PrefixIndex
from nf_kvcache.lower_tiers import LowerTiers
from nf_kvcache.page_table import PageTable
from nf_kvcache.prefix_match import PrefixMatch
from nf_kvcache.restore import Restore, RestoreStep
from nf_kvcache.sequence import NO_TOKENS, CachedSequence
from nf_kvcache.tier import Tier


class PrefixRestores:
    """Starts what brings the pages of matches to the device, and goes on with what has come.

    Args:
        device: pages of the device.
        index: of all tiers.
        table: pages of the sequences.
        lower: tiers below the device, if there are any.
        page_size: token slots in a page.
    """

    def __init__(
        self,
        device: DevicePages,
        index: PrefixIndex,
        table: PageTable,
        lower: LowerTiers | None,
        page_size: int,
    ) -> None:
        self._device = device
        self._index = index
        self._table = table
        self._lower = lower
        self._page_size = page_size

    def pages_there(self, match: PrefixMatch) -> list[int]:
        """For every page of a match that on the device, or that it is on its way to; else -1."""
        pages: list[int] = match.pages[:, Tier.DEVICE].tolist()
        if self._lower is not None and self._lower.incoming:
            for i, node in enumerate(match.nodes.tolist()):
                if pages[i] < 0 and node in self._lower.incoming:
                    pages[i] = self._lower.incoming[node][0]
        return pages

    def begin(self, seq: str, entry: CachedSequence, fresh: list[int]) -> None:
        """Fill the row of a new sequence, and start what its match needs.

        Args:
            seq: its name.
            entry: the sequence, with its match; `restores` of it is set.
            fresh: pages taken for it, besides those of the match on the device.
        """
        match = entry.match
        nodes = match.nodes.tolist()
        fresh_pages = iter(fresh)
        row: list[int] = []
        steps: list[RestoreStep] = []
        restores: list[Restore] = []
        for i, page in enumerate(self.pages_there(match)):
            if page < 0:
                page = next(fresh_pages)
                _, host, slot = match.pages[i].tolist()
                steps.append(RestoreStep(nodes[i], page, host, slot, ready=host >= 0))
            elif match.pages[i, Tier.DEVICE] < 0 and self._lower is not None:
                restore = self._lower.incoming[nodes[i]][1]
                if restore not in restores:
                    restores.append(restore)
            row.append(page)
        row += fresh_pages
        self._table.append(entry.row, row)
        if match.tail is not None:
            page = row[len(nodes)]
            steps.append(RestoreStep(0, page, match.tail.page, -1, ready=True))
        for restore in restores:
            restore.waiters.add(seq)
        if steps and self._lower is not None:
            restores.append(self._lower.restore(seq, steps))
        entry.restores = restores

    def end(self, seq: str, entry: CachedSequence) -> PrefixMatch | None:
        """Go on with what has come; None while there is no page for what has not."""
        nodes = entry.match.nodes.tolist()
        pages = self._table.pages(entry.row)
        came = 0
        while came < len(nodes) and self._has_come(entry, came, pages[came]):
            came += 1
        match = entry.match
        tail = match.tail
        if came < len(nodes):
            if not self._make_private(seq, entry, came, len(nodes)):
                return None
            tail = None
        elif tail is not None and entry.restores[-1].num_arrived < len(entry.restores[-1].steps):
            tail = None
        if came < len(nodes) or tail is not match.tail:
            match = match.first(came, self._page_size)
        for restore in entry.restores:
            restore.waiters.discard(seq)
        entry.restores = []
        entry.match = match
        entry.move(self._index, nodes[came - 1] if came else self._index.root(match.salt))
        entry.num_tokens = match.num_tokens
        entry.tail = NO_TOKENS if tail is None else tail.tokens
        return match

    def _has_come(self, entry: CachedSequence, position: int, page: int) -> bool:
        """Whether a page of the match is on the device."""
        if entry.match.pages[position, Tier.DEVICE] >= 0:
            return True
        return any(
            page == step.page
            for restore in entry.restores
            for step in restore.steps[: restore.num_arrived]
        )

    def _make_private(self, seq: str, entry: CachedSequence, start: int, stop: int) -> bool:
        """Make the pages at these positions ones that `seq` can write to; False if pages are out.

        They belong to a match of which less has come than was promised. A page of a restore that
        `seq` has begun stays: whoever else has waited for it takes another.
        """
        pool = self._device.pool
        pages = self._table.pages(entry.row)
        own = {
            step.page
            for restore in entry.restores
            if restore.owner == seq
            for step in restore.steps[restore.num_arrived :]
        }
        for position in range(start, stop):
            page = pages[position]
            if pool.references(page) == 1:
                self._device.displace(page)
            elif page not in own:
                if not pool.can_take(1):
                    return False
                self._table.replace(entry.row, position, pool.take(1)[0])
                pool.release([page], keep=self._device.nodes)
        return True
