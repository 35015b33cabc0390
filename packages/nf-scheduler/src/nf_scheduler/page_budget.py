"""What the scheduler needs from whoever owns the KV pages."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class PrefixMatch(Protocol):
    """A prefix of a sequence whose KV already exists.

    It is good until the next call that reserves or releases pages.
    """

    @property
    def num_tokens(self) -> int:
        """Length of the prefix in tokens; a whole number of pages."""

    @property
    def pending(self) -> bool:
        """True while pages of it are on their way up from a lower tier: match again later."""


class PageBudget(Protocol):
    """Pages of KV, handed out by the sequence. `nf_kvcache.KVCache` is one.

    A sequence is named by its request id, begins with its first `reserve` and ends with `release`.
    The scheduler passes a match only to the `can_reserve` and `reserve` that follow it directly.
    """

    @property
    def page_size(self) -> int:
        """Token slots in a page."""

    @property
    def num_pages(self) -> int:
        """Pages that exist. One sequence alone can always have them all."""

    def match(self, token_ids: np.ndarray) -> PrefixMatch:
        """Find the longest prefix of `token_ids` (int32 [n]) whose KV exists, in whole pages."""

    def can_reserve(self, seq: str, num_tokens: int, match: Any = None) -> bool:
        """Whether `reserve` with the same arguments would succeed now."""

    def reserve(self, seq: str, num_tokens: int, match: Any = None) -> None:
        """Give `seq` room for `num_tokens` tokens in total, from its start.

        The first call for a sequence may carry a match, whose pages then are the sequence's first
        ones.

        Raises:
            RuntimeError: there are not enough pages; nothing has changed.
        """

    def commit(self, seq: str, token_ids: np.ndarray) -> None:
        """Say that the KV of the next tokens of `seq` (int32 [n]) is complete.

        They follow those of the match and of earlier commits. The scheduler calls this whenever
        pages have become full, with the tokens of those pages.
        """

    def release(self, seq: str) -> None:
        """End `seq`; its pages may be kept for later matches, but no longer count as taken."""
