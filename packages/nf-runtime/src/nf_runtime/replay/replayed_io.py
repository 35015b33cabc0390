"""Stand-ins that answer what a log says was answered."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from nf_kvcache.copier import Download
from nf_kvcache.disk import DiskEvents, DiskStats, StoredPage
from nf_kvcache.kv_cache import salt_digest
from nf_runtime.replay.log_cursor import LogCursor
from nf_runtime.replay.log_format import Tag
from nf_runtime.replay.token_names import named_tokens

if TYPE_CHECKING:
    from nf_kvcache.copier import Event, Layer


class ReplayedEvent:
    """An event whose state is in the log."""

    def __init__(self, cursor: LogCursor) -> None:
        self.failed = False
        self._cursor = cursor

    @property
    def done(self) -> bool:
        """Whether it had come."""
        state = self._cursor.expect(Tag.EVENT, "whether a copy has ended").number()
        self.failed = state == 2
        return state > 0

    def wait(self, timeout: float | None = None) -> bool:
        """There is nothing to wait for."""
        return True


class ReplayedRead:
    """A read of the disk whose end is in the log."""

    def __init__(self, cursor: LogCursor) -> None:
        self.num_good = 0
        self._cursor = cursor

    @property
    def done(self) -> bool:
        """Whether nothing more was to arrive."""
        state = self._cursor.expect(Tag.DISK_READ, "whether a read has ended").number()
        self.num_good = max(0, state - 1)
        return state > 0

    def cancel(self) -> None:
        """There is nothing to cancel."""


class ReplayedDisk:
    """A disk tier that answers what the log says, and keeps nothing.

    Args:
        cursor: Where the log is read.
        page_bytes: Of a page.
        page_size: Tokens of a page.
        with_tokens: Whether the log has the real tokens.
    """

    def __init__(
        self, cursor: LogCursor, *, page_bytes: int, page_size: int, with_tokens: bool
    ) -> None:
        self.page_bytes = page_bytes
        self.page_size = page_size
        self._cursor = cursor
        self._with_tokens = with_tokens

    @property
    def is_busy(self) -> bool:
        """Whether a page had to wait."""
        return self._cursor.expect(Tag.DISK_BUSY, "whether the disk takes a page").number() > 0

    def pages(self) -> list[StoredPage]:
        """What an earlier process had left."""
        log = self._cursor.expect(Tag.DISK_PAGES, "what the disk holds")
        pages = []
        for _ in range(log.number()):
            slot, parent, salt = log.number(), log.signed(), log.text()
            if self._with_tokens:
                page = StoredPage(slot, parent, bytes.fromhex(salt), log.array())
            else:
                tokens = named_tokens(self.page_size, [log.word()], self.page_size)
                page = StoredPage(slot, parent, salt_digest(salt), tokens)
            pages.append(page)
        return pages

    def write(
        self, parent_slot: int, salt: bytes, tokens: np.ndarray, data: np.ndarray
    ) -> int | None:
        """The slot that a page was given."""
        slot = self._cursor.expect(Tag.DISK_WRITE, "the slot of a page").number()
        return slot - 1 if slot else None

    def read(self, slots: Sequence[int], buffers: Sequence[np.ndarray]) -> ReplayedRead:
        """A read that ends when it did."""
        return ReplayedRead(self._cursor)

    def touch(self, slots: Sequence[int]) -> None:
        """Nothing is kept."""

    def poll(self) -> DiskEvents:
        """What the disk had done."""
        log = self._cursor.expect(Tag.DISK_POLL, "what the disk has done")
        return DiskEvents(log.numbers(), log.numbers(), log.numbers())

    def wait(self, timeout: float) -> None:
        """There is nothing to wait for."""

    def flush(self, timeout: float) -> bool:
        """There is nothing to write."""
        return True

    def stats(self) -> DiskStats:
        """Nothing of it is in a log."""
        numbers: dict[str, Any] = {field.name: 0 for field in fields(DiskStats)}
        return DiskStats(**numbers | {"io": "replay", "writes_dropped": {}, "errors": {}})

    def close(self) -> None:
        """There is nothing to end."""


class NoCopies:
    """A copier that copies nothing: in a replay, pages have no content.

    Attributes:
        download_seconds: 0.
        upload_seconds: 0.
    """

    download_seconds = 0.0
    upload_seconds = 0.0

    def __init__(self, cursor: LogCursor) -> None:
        self._event = ReplayedEvent(cursor)  # the one that is asked is another, from `watch`

    def download(
        self, layers: "Sequence[Layer]", pages: Sequence[int], targets: Sequence[np.ndarray]
    ) -> Download:
        """Copy nothing."""
        return Download(self._event, self._event)

    def upload(
        self, layers: "Sequence[Layer]", pages: Sequence[int], sources: Sequence[np.ndarray]
    ) -> "Event":
        """Copy nothing."""
        return self._event

    def duplicate(self, layers: "Sequence[Layer]", source: int, target: int) -> None:
        """Copy nothing."""

    def hold(self, event: "Event") -> None:
        """Wait for nothing."""

    def close(self) -> None:
        """There is nothing to end."""
