"""Which tenant's turn it is."""

from __future__ import annotations

from collections import Counter

import numpy as np

_DECODE_WEIGHT = 2.0  # of a decode beside a prompt token, as in the source


class TenantShares:
    """What was computed for each tenant; the one that has had least goes first.

    The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI
    2024): while several tenants have something waiting, each gets the same. Who had nothing to do
    for a while gets no more for that: its count is raised to the least of those who had.

    A tenant is known while it has requests, and after that until its count would be raised anyway.
    """

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._free: list[int] = []
        self._served = np.zeros(0)
        self._live: Counter[str] = Counter()

    def __len__(self) -> int:
        """Number of tenants known; with one alone there is nothing to share."""
        return len(self._index)

    def enter(self, tenant: str) -> None:
        """Count one more request of `tenant`."""
        if not self._live[tenant]:
            floor = self._floor()
            if tenant not in self._index:
                self._index[tenant] = self._take_index()
            index = self._index[tenant]
            self._served[index] = max(self._served[index], floor)
        self._live[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Count one request less of `tenant`."""
        self._live[tenant] -= 1
        if self._live[tenant]:
            return
        del self._live[tenant]
        floor = self._floor()
        for name, index in list(self._index.items()):
            if name not in self._live and (self._served[index] <= floor or not self._live):
                del self._index[name]
                self._served[index] = 0.0
                self._free.append(index)

    def index(self, tenant: str) -> int:
        """Where `charge` counts for a tenant that has requests."""
        return self._index[tenant]

    def served(self, tenant: str) -> float:
        """What was computed for a tenant that has requests, in prompt tokens."""
        return float(self._served[self._index[tenant]])

    def charge(self, tenants: np.ndarray, num_tokens: np.ndarray, num_decodes: int) -> None:
        """Count a batch.

        Args:
            tenants: int32 [n], the index of each request's tenant, decodes first.
            num_tokens: int32 [n], new tokens of each.
            num_decodes: how many decodes there are.
        """
        weights = num_tokens.astype(np.float64)
        weights[:num_decodes] *= _DECODE_WEIGHT
        self._served += np.bincount(tenants, weights, minlength=len(self._served))

    def _floor(self) -> float:
        """The least count of those who have requests."""
        return min((float(self._served[self._index[name]]) for name in self._live), default=0.0)

    def _take_index(self) -> int:
        if not self._free:
            self._free.append(len(self._served))
            self._served = np.append(self._served, 0.0)
        return self._free.pop()
