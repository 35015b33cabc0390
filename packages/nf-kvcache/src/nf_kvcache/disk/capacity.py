"""How many pages a bound in bytes has room for."""

from __future__ import annotations

from dataclasses import dataclass

from nf_kvcache.disk.format import BLOCK_BYTES, Meta

_SHARED_MEMORY_BYTES = 64 << 10  # index.sqlite-shm
_SMALL_FILES_BYTES = 16 << 10  # lock and meta.json
_MAX_LOG_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Capacity:
    """What `max_bytes` is spent on.

    Attributes:
        num_slots: pages in the segment files.
        index_bytes: the most that index.sqlite may grow to.
        log_bytes: the most that its write-ahead log may grow to.
        total_bytes: of all files.
    """

    num_slots: int
    index_bytes: int
    log_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, num_slots: int, meta: Meta) -> Capacity:
        """What `num_slots` pages take."""
        # The tokens are in the table and in its index. B-trees are at least half full.
        row_bytes = 2 * (2 * 4 * meta.fingerprint.page_size + 160)
        index_bytes = -(-num_slots * row_bytes // BLOCK_BYTES) * BLOCK_BYTES + (64 << 10)
        log_bytes = min(_MAX_LOG_BYTES, 2 * index_bytes)
        total_bytes = (
            num_slots * meta.slot_bytes
            + index_bytes
            + log_bytes
            + _SHARED_MEMORY_BYTES
            + _SMALL_FILES_BYTES
        )
        return cls(num_slots, index_bytes, log_bytes, total_bytes)

    @classmethod
    def within(cls, max_bytes: int, meta: Meta) -> Capacity:
        """The most that fits.

        Raises:
            ValueError: not even two pages do: one that stays, and one to make room ahead.
        """
        low, high = 0, max(1, max_bytes // meta.slot_bytes)
        while low < high:
            middle = (low + high + 1) // 2
            if cls.of(middle, meta).total_bytes <= max_bytes:
                low = middle
            else:
                high = middle - 1
        if low < 2:
            least = cls.of(2, meta).total_bytes
            raise ValueError(
                f"max_bytes is {max_bytes}, which has no room for two pages of "
                f"{meta.slot_bytes} bytes and their index; expected at least {least}."
            )
        return cls.of(low, meta)
