"""What a search for a prefix returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from nf_kvcache.tier import Tier


def _no_nodes() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


def _no_pages() -> np.ndarray:
    return np.zeros((0, len(Tier)), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Tail:
    """The KV of tokens that do not fill a page, kept on the host for a preempted sequence.

    Attributes:
        node: the prefix that they follow.
        tokens: int32 [n], n below the page size.
        page: page of the host that holds them.
    """

    node: int
    tokens: np.ndarray
    page: int


@dataclass(frozen=True, slots=True, eq=False)
class PrefixMatch:
    """KV that exists of the beginning of a sequence, in whatever tier.

    A match takes nothing: pages can go to others until it is handed to `KVCache.reserve`.

    Attributes:
        num_tokens: length of the prefix; whole pages, and the tail of a preempted sequence.
        queried_tokens: length of the sequence that was looked for.
        nodes: int64 [pages], place of each page in the index.
        pages: int32 [pages, tiers], where it is; -1 where it is not.
        tail: what follows the last page.
        salt: of the root of the nodes.
    """

    num_tokens: int = 0
    queried_tokens: int = 0
    nodes: np.ndarray = field(default_factory=_no_nodes, repr=False)
    pages: np.ndarray = field(default_factory=_no_pages, repr=False)
    tail: Tail | None = field(default=None, repr=False)
    salt: bytes = field(default=b"", repr=False)

    @property
    def pending(self) -> bool:
        """False: a match can be reserved at once; `KVCache.restored` says what has come of it."""
        return False

    @property
    def tiers(self) -> np.ndarray:
        """int64 [pages]: the fastest tier that each page is in."""
        tiers: np.ndarray = np.argmax(self.pages >= 0, axis=1)
        return tiers

    @property
    def tokens_by_tier(self) -> Mapping[str, int]:
        """Tokens by the fastest tier that they are in; those that have none are left out."""
        if not self.num_tokens:
            return MappingProxyType({})
        counts = np.bincount(self.tiers, minlength=len(Tier))
        tail = 0 if self.tail is None else len(self.tail.tokens)
        page_size = (self.num_tokens - tail) // max(1, len(self.nodes))
        tokens = {tier.label: int(counts[tier]) * page_size for tier in Tier}
        tokens[Tier.HOST.label] += tail
        return {label: count for label, count in tokens.items() if count}

    def first(self, num_pages: int, page_size: int) -> PrefixMatch:
        """The match, cut to its first pages."""
        return PrefixMatch(
            num_pages * page_size,
            self.queried_tokens,
            self.nodes[:num_pages],
            self.pages[:num_pages],
            salt=self.salt,
        )
