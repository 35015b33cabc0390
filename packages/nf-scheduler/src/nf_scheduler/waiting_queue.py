"""Requests that wait for pages and a slot."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from operator import attrgetter

from nf_scheduler.sequence import Sequence
from nf_scheduler.tenant_shares import TenantShares

_by_place = attrgetter("place")


class WaitingQueue:
    """Queued requests: tenants by their shares, those of one tenant by rank, then arrival.

    Args:
        shares: whose turn it is.

    Attributes:
        num_prompt_tokens: of all that are queued.
    """

    def __init__(self, shares: TenantShares) -> None:
        self.num_prompt_tokens = 0
        self._shares = shares
        self._by_tenant: dict[str, list[Sequence]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, tenant by tenant, each tenant's in order."""
        for sequences in self._by_tenant.values():
            yield from sequences

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        mine = self._by_tenant.setdefault(sequence.request.tenant, [])
        bisect.insort(mine, sequence, key=_by_place)
        self._count += 1
        self.num_prompt_tokens += sequence.request.prompt_len

    def remove(self, sequence: Sequence) -> None:
        """Take a request out.

        Raises:
            RuntimeError: it is not queued, or its rank was changed while it was.
        """
        tenant = sequence.request.tenant
        mine = self._by_tenant.get(tenant, [])
        position = bisect.bisect_left(mine, sequence.place, key=_by_place)
        if position == len(mine) or mine[position] is not sequence:
            raise RuntimeError(f"Request {sequence.request_id!r} is not where its rank says.")
        del mine[position]
        if not mine:
            del self._by_tenant[tenant]
        self._count -= 1
        self.num_prompt_tokens -= sequence.request.prompt_len

    def head(self) -> Sequence | None:
        """Who is next; None if nobody is queued."""
        if not self._by_tenant:
            return None
        if len(self._by_tenant) == 1:
            return next(iter(self._by_tenant.values()))[0]
        # Never by name: where a run is repeated from a log, tenants have other names.
        shares = self._shares
        tenant = min(self._by_tenant, key=lambda name: (shares.served(name), shares.index(name)))
        return self._by_tenant[tenant][0]
