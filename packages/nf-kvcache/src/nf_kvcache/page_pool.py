"""Which pages are in use, by how many, and which can be given to somebody else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence

from nf_kvcache.errors import OutOfPages


class PagePool:
    """Reference counts of pages 0 to num_pages - 1. Every operation is O(1) per page.

    A page is *free* (nobody needs it), *idle* (unreferenced, but what it holds is worth keeping),
    or *used* (referenced). Free pages are given out first, then idle ones, least recently used
    first.

    Args:
        num_pages: how many there are.
        on_evict: called with an idle page before it is given to somebody else.

    Attributes:
        num_pages: how many there are.
        on_evict: as given; can be set later.
        evictions: idle pages given to somebody else, so far.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], object] = lambda _: None) -> None:
        self.num_pages = num_pages
        self.evictions = 0
        self.on_evict = on_evict
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Pages that nobody needs."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Pages that are kept for later, but can be taken."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that are referenced."""
        return self.num_pages - len(self._free) - len(self._idle)

    def is_idle(self, page: int) -> bool:
        """Whether `page` is kept for later, but can be taken."""
        return page in self._idle

    def references(self, page: int) -> int:
        """How many hold `page`."""
        return self._references[page]

    def can_take(self, count: int, shared: Sequence[int] = ()) -> bool:
        """Whether `take` with the same arguments would succeed."""
        return count <= self._available(shared)

    def take(self, count: int, shared: Sequence[int] = ()) -> list[int]:
        """Add a reference to each of `shared`, and take `count` more pages with one reference each.

        Args:
            count: pages to take; what they hold is undefined.
            shared: used or idle pages; they are not among those taken.

        Raises:
            OutOfPages: fewer than `count` other pages are free or idle; nothing has changed.
        """
        available = self._available(shared)
        if count > available:
            raise OutOfPages(
                f"{count} pages of KV were asked for, and {available} of {self.num_pages} are "
                "available. Release a sequence first."
            )
        self.hold(shared)
        for _ in range(count - len(self._free)):
            page, _ = self._idle.popitem(last=False)
            self.on_evict(page)
            self.evictions += 1
            self._free.append(page)
        start = len(self._free) - count
        pages = self._free[start:][::-1]
        del self._free[start:]
        for page in pages:
            self._references[page] = 1
        return pages

    def release(self, pages: Iterable[int], keep: Container[int]) -> None:
        """Drop a reference to each of `pages`, in this order.

        One that nobody holds any more becomes idle if it is in `keep`, as the most recently used;
        else it is free.
        """
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in keep:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def hold(self, pages: Iterable[int]) -> None:
        """Add a reference to each of `pages`, which are used or idle."""
        for page in pages:
            if self._references[page] == 0:
                del self._idle[page]
            self._references[page] += 1

    def touch(self, page: int) -> None:
        """Count an idle page as the most recently used; does nothing to a used one."""
        if page in self._idle:
            self._idle.move_to_end(page)

    def discard(self, page: int) -> None:
        """Say that what an unreferenced page holds is not worth keeping any more."""
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def _available(self, shared: Sequence[int]) -> int:
        """Pages that can be taken beside `shared`."""
        idle = sum(1 for page in shared if self._references[page] == 0)
        return len(self._free) + len(self._idle) - idle

    def check_integrity(self) -> None:
        """Compare the three sets of pages with the counts.

        Raises:
            RuntimeError: names the page that is in none or several of them.
        """
        unused = sorted([*self._free, *self._idle])
        expected = [page for page, count in enumerate(self._references) if count == 0]
        if unused != expected:
            wrong = sorted(set(unused) ^ set(expected)) or unused
            raise RuntimeError(
                f"The page pool is broken: pages {wrong[:8]} are referenced and available at once, "
                "neither of both, or available twice."
            )
