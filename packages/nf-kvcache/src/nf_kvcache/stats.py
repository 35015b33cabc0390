"""Numbers for operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nf_kvcache.disk import DiskStats


@dataclass(frozen=True, slots=True)
class LowerTierStats:
    """A moment of the tiers below the device. Counters only grow.

    Attributes:
        host_pages_total: pages that exist; the sum of the next three.
        host_pages_used: being written or read.
        host_pages_cached: can be found by a match.
        host_pages_free: hold nothing of use.
        host_evictions: counter of cached pages given up for others.
        host_placement: where the memory of the host is, in words.
        downloaded_bytes: counter of bytes brought to the host.
        download_seconds: counter of time spent on that.
        uploaded_bytes: counter of bytes brought to the device.
        upload_seconds: counter of time spent on that.
        skipped_pages: counter of pages that became full while the host had no room for them.
        unwritten_pages: counter of pages that left the host before the disk could take them.
        restores_under_way: sequences' prefixes on their way up.
        restores_cut: counter of those that brought less than was found.
        disk: of the disk tier, if there is one.
    """

    host_pages_total: int
    host_pages_used: int
    host_pages_cached: int
    host_pages_free: int
    host_evictions: int
    host_placement: str
    downloaded_bytes: int
    download_seconds: float
    uploaded_bytes: int
    upload_seconds: float
    skipped_pages: int
    unwritten_pages: int
    restores_under_way: int
    restores_cut: int
    disk: DiskStats | None


@dataclass(frozen=True, slots=True)
class KVCacheStats:
    """A moment of a cache.

    Attributes:
        pages_total: pages of the device; the sum of the next three.
        pages_used: referenced by a sequence.
        pages_cached: unreferenced, but can be found by a match; taken when free ones are out.
        pages_free: hold nothing of use.
        queried_tokens: tokens looked for by the matches that sequences began with, so far.
        hit_tokens: tokens that those matches found, and that came.
        evictions: cached pages given to somebody else, so far.
        hit_tokens_by_tier: `hit_tokens` by where they were found.
        lower: of the tiers below; None if there are none.
    """

    pages_total: int
    pages_used: int
    pages_cached: int
    pages_free: int
    queried_tokens: int
    hit_tokens: int
    evictions: int
    hit_tokens_by_tier: Mapping[str, int]
    lower: LowerTierStats | None = None
