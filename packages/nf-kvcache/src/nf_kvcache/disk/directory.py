"""The directory of one rank's pages: who holds it, and what lies in it."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from nf_kvcache.disk.capacity import Capacity
from nf_kvcache.disk.errors import CacheInUse
from nf_kvcache.disk.format import (
    DAMAGED_SUFFIX,
    INDEX_NAME,
    LOCK_NAME,
    META_NAME,
    Meta,
    subdirectory,
)
from nf_kvcache.disk.page_index import DamagedIndex, PageIndex

logger = logging.getLogger("nf_kvcache.disk")


class CacheDirectory:
    """The claim to a directory: nobody else can have it until `close`.

    Args:
        root: the cache directory, shared with other models and ranks.
        meta: what is to be kept.
        replica: number of the engine among those of the same model.
        rank: number of the process within the engine.

    Attributes:
        path: the directory.

    Raises:
        CacheInUse: somebody else has it.
        OSError: it cannot be made or written.
    """

    def __init__(self, root: str | os.PathLike[str], meta: Meta, replica: int, rank: int) -> None:
        self.path = Path(root) / subdirectory(meta.fingerprint, replica, rank)
        # Tokens can be read from it, and so what somebody wrote: nobody else's business.
        Path(root).mkdir(parents=True, exist_ok=True)
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._meta = meta
        self._lock = self._claim()
        try:
            self._check_meta()
        except BaseException:
            self.close()
            raise
        _report_others(Path(root), self.path.parent)

    def open_index(self, max_bytes: int) -> tuple[PageIndex, Capacity]:
        """The index, and what there is room for. A damaged index is set aside: the cache is empty.

        Raises:
            OSError: the index cannot be opened or written.
            ValueError: max_bytes has no room for a page.
        """
        path = self.path / INDEX_NAME
        aside = path.with_name(INDEX_NAME + DAMAGED_SUFFIX)
        capacity = self._capacity(max_bytes, aside)
        try:
            return PageIndex(path, capacity.index_bytes, capacity.log_bytes), capacity
        except DamagedIndex as error:
            for suffix in ("-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            if path.stat().st_size <= max_bytes // 16:
                os.replace(path, aside)
                what = f"It was renamed to {aside.name}"
            else:
                path.unlink()
                what = "It was deleted, being too large to keep"
            logger.warning("%s cannot be read: %s. %s; the cache is empty.", path, error, what)
        capacity = self._capacity(max_bytes, aside)
        return PageIndex(path, capacity.index_bytes, capacity.log_bytes), capacity

    def close(self) -> None:
        """Give up the claim."""
        os.close(self._lock)

    def _claim(self) -> int:
        path = self.path / LOCK_NAME
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            by = f" by process {holder}" if holder else ""
            raise CacheInUse(
                f"{self.path} is in use{by}. Give each engine on this directory a replica number "
                "of its own, or another directory."
            ) from None
        except BaseException:
            os.close(lock)
            raise
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock

    def _check_meta(self) -> None:
        """Write meta.json, or see that the files beside it are what it says."""
        path = self.path / META_NAME
        why = None
        try:
            if Meta.from_json(path.read_text(encoding="utf-8")) == self._meta:
                return
            why = "it describes something else"
        except FileNotFoundError:
            if (self.path / INDEX_NAME).exists():
                why = "it is missing"
        except ValueError as error:
            why = str(error)
        if why is not None:
            # What the index says of the slots cannot be trusted then.
            logger.warning("%s cannot be used: %s. The cache is emptied.", path, why)
            for suffix in ("", "-wal", "-shm"):
                (self.path / f"{INDEX_NAME}{suffix}").unlink(missing_ok=True)
        new = path.with_suffix(".new")
        with open(new, "w", encoding="utf-8") as file:
            file.write(self._meta.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)

    def _capacity(self, max_bytes: int, aside: Path) -> Capacity:
        kept = aside.stat().st_size if aside.exists() else 0
        return Capacity.within(max_bytes - kept, self._meta)


def _report_others(root: Path, own: Path) -> None:
    """One line about the caches of other models and formats, which nobody deletes but the user."""
    others = [path for path in root.iterdir() if path.is_dir() and path != own]
    total = 0
    for other in others:
        for directory, _, names in os.walk(other):
            for name in names:
                try:
                    total += os.lstat(os.path.join(directory, name)).st_size
                except OSError:
                    continue  # its owner has just deleted it
    if total:
        logger.info(
            "%s holds %d bytes of %d other models, types or formats, which are ignored; delete "
            "what is not needed: %s",
            root,
            total,
            len(others),
            ", ".join(sorted(path.name for path in others)[:8]),
        )
