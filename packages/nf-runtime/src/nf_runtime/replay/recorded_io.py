"""Stand-ins that write down what they answer, and ask the real thing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nf_kvcache.disk import DiskEvents, DiskStats, StoredPage
from nf_runtime.replay.log_format import Tag
from nf_runtime.replay.log_writer import LogWriter
from nf_runtime.replay.token_names import NO_PAGES, TokenNames, name_of

if TYPE_CHECKING:
    from nf_kvcache.copier import Event
    from nf_kvcache.disk_store import DiskStore, StoredRead


class RecordedEvent:
    """An event whose state is written down whenever it is asked for."""

    def __init__(self, event: "Event", log: LogWriter) -> None:
        self.failed = False
        self._event = event
        self._log = log

    @property
    def done(self) -> bool:
        """Whether it has come."""
        done = self._event.done
        self.failed = done and self._event.failed
        self._log.tag(Tag.EVENT)
        self._log.number(done + self.failed)
        return done

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it. Nothing depends on the answer, so it is not written down."""
        return self._event.wait(timeout)


class RecordedRead:
    """A read of the disk whose end is written down."""

    def __init__(self, read: "StoredRead", log: LogWriter) -> None:
        self.num_good = 0
        self._read = read
        self._log = log

    @property
    def done(self) -> bool:
        """Whether nothing more will arrive."""
        done = self._read.done
        self._log.tag(Tag.DISK_READ)
        if done:
            self.num_good = self._read.num_good
        self._log.number(self.num_good + 1 if done else 0)
        return done

    def cancel(self) -> None:
        """Read nothing that has not been started."""
        self._read.cancel()


class RecordedDisk:
    """A disk tier whose answers are written down.

    Args:
        disk: The real one.
        log: Where to write.
        names: For the pages that it holds at the start; None writes their tokens.
    """

    def __init__(self, disk: "DiskStore", log: LogWriter, names: TokenNames | None) -> None:
        self.page_bytes = disk.page_bytes
        self.page_size = disk.page_size
        self._disk = disk
        self._log = log
        self._names = names

    @property
    def is_busy(self) -> bool:
        """Whether a page has to wait."""
        busy = self._disk.is_busy
        self._log.tag(Tag.DISK_BUSY)
        self._log.number(busy)
        return busy

    def pages(self) -> list[StoredPage]:
        """What an earlier process left."""
        pages, log = self._disk.pages(), self._log
        log.tag(Tag.DISK_PAGES)
        log.number(len(pages))
        digests: dict[int, bytes] = {-1: NO_PAGES}
        for page in pages:
            log.number(page.slot)
            log.signed(page.parent_slot)
            if self._names is None:
                log.text(page.salt.hex())
                log.array(page.tokens)
            else:
                digest = self._names.digest(digests[page.parent_slot], page.tokens)
                digests[page.slot] = digest
                log.text(self._names.alias(page.salt))
                log.word(name_of(digest))
        return pages

    def write(
        self, parent_slot: int, salt: bytes, tokens: np.ndarray, data: np.ndarray
    ) -> int | None:
        """Queue a page."""
        slot = self._disk.write(parent_slot, salt, tokens, data)
        self._log.tag(Tag.DISK_WRITE)
        self._log.number(0 if slot is None else slot + 1)
        return slot

    def read(self, slots: Sequence[int], buffers: Sequence[np.ndarray]) -> RecordedRead:
        """Begin to read pages."""
        return RecordedRead(self._disk.read(slots, buffers), self._log)

    def touch(self, slots: Sequence[int]) -> None:
        """Count pages as used now."""
        self._disk.touch(slots)

    def poll(self) -> DiskEvents:
        """Take note of what has finished."""
        events = self._disk.poll()
        self._log.tag(Tag.DISK_POLL)
        for slots in events:
            self._log.numbers(slots)
        return events

    def wait(self, timeout: float) -> None:
        """Wait until there is something to `poll`."""
        self._disk.wait(timeout)

    def flush(self, timeout: float) -> bool:
        """Wait until all is written; only asked at the end, so not written down."""
        return self._disk.flush(timeout)

    def stats(self) -> DiskStats:
        """What happened so far."""
        return self._disk.stats()

    def close(self) -> None:
        """End it."""
        self._disk.close()
