"""Numbers for operators."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVCacheStats:
    """A moment of a cache.

    Attributes:
        pages_total: pages that exist; the sum of the next three.
        pages_used: referenced by a sequence.
        pages_cached: unreferenced, but can be found by a match; taken when free ones are out.
        pages_free: hold nothing of use.
        queried_tokens: tokens looked for by the matches that sequences began with, so far.
        hit_tokens: tokens that those matches found.
        evictions: cached pages given to somebody else, so far.
    """

    pages_total: int
    pages_used: int
    pages_cached: int
    pages_free: int
    queried_tokens: int
    hit_tokens: int
    evictions: int
