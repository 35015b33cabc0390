"""A sequence whose KV is in the cache."""

from __future__ import annotations

import numpy as np

from nf_kvcache.index import PrefixIndex
from nf_kvcache.offload import HostArrival
from nf_kvcache.prefix_match import PrefixMatch
from nf_kvcache.restore import Restore

NO_TOKENS = np.zeros(0, dtype=np.int32)


class CachedSequence:
    """Where the pages of a sequence are, and how far they are filled and indexed.

    Attributes:
        row: of the page table.
        node: the longest indexed prefix, which it holds.
        salt: of the root of `node`.
        num_tokens: tokens whose KV is complete.
        tail: int32, those of them that do not fill a page yet.
        match: what it began with.
        restores: what it waits for.
        arrivals: by position, full pages on their way down.
        forked: whether its last page may be shared while it is partly filled.
    """

    __slots__ = (
        "arrivals",
        "forked",
        "match",
        "node",
        "num_tokens",
        "restores",
        "row",
        "salt",
        "tail",
    )

    def __init__(self, row: int, node: int, salt: bytes, match: PrefixMatch) -> None:
        self.row = row
        self.node = node
        self.salt = salt
        self.num_tokens = 0
        self.tail = NO_TOKENS
        self.match = match
        self.restores: list[Restore] = []
        self.arrivals: dict[int, HostArrival] = {}
        self.forked = False

    def move(self, index: PrefixIndex, node: int) -> None:
        """Hold another node in place of the one it holds."""
        index.hold(node)
        index.unhold(self.node)
        self.node = node
