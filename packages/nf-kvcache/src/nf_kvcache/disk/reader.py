"""Reading a cache without an engine, also while one is writing it."""

from __future__ import annotations

import math
import os
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from nf_kvcache.disk.errors import NotACache, PageGone
from nf_kvcache.disk.format import (
    APPLICATION_ID,
    FORMAT_VERSION,
    INDEX_NAME,
    META_NAME,
    ROOT,
    Meta,
    child_identity,
    page_checksum,
    root_identity,
    segment_name,
)


class CachedPage(NamedTuple):
    """A page that the index speaks of.

    Attributes:
        row_id: its row in the index.
        slot: where its data is.
        checksum: of its data.
        identity: of the prefix that ends with it.
    """

    row_id: int
    slot: int
    checksum: int
    identity: int


class DiskReader:
    """The pages of one rank. It takes no lock and changes nothing but SQLite's shared memory file.

    An engine may evict a page between `match` and `read`; `read` notices.

    Args:
        directory: one of `caches`.

    Attributes:
        meta: what the cache is of.

    Raises:
        NotACache: it has no cache that this version can read.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        try:
            self.meta = Meta.from_json((self._directory / META_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise NotACache(f"{self._directory} holds no cache that can be read: {error}") from None
        path = self._directory / INDEX_NAME
        uri = f"{path.resolve().as_uri()}?mode=ro"
        try:
            self._connection = sqlite3.connect(uri, uri=True, timeout=5.0, isolation_level=None)
            found = tuple(
                self._connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version")
            )
        except sqlite3.Error as error:
            raise NotACache(f"{path} cannot be read: {error}") from None
        if found != (APPLICATION_ID, FORMAT_VERSION):
            self._connection.close()
            raise NotACache(f"{path} is no index of version {FORMAT_VERSION}.")

    @staticmethod
    def caches(root: str | os.PathLike[str]) -> list[Path]:
        """Directories below a cache directory that have a cache of one rank each."""
        return sorted(path.parent for path in Path(root).glob(f"*/replica-*-rank-*/{META_NAME}"))

    def __len__(self) -> int:
        """How many pages there are now."""
        return int(self._connection.execute("SELECT count(*) FROM page").fetchone()[0])

    def match(self, tokens: npt.NDArray[np.int32], salt: bytes = b"") -> list[CachedPage]:
        """The pages of the longest prefix of `tokens` that is there, in order.

        Args:
            tokens: int32 [n].
            salt: under which they were written.
        """
        page_size = self.meta.fingerprint.page_size
        pages: list[CachedPage] = []
        parent, identity = ROOT, root_identity(salt)
        for start in range(0, len(tokens) - page_size + 1, page_size):
            key = np.asarray(tokens[start : start + page_size], dtype="<i4").tobytes()
            row = self._connection.execute(
                "SELECT id, slot, checksum FROM page WHERE parent = ? AND tokens = ? AND salt IS ?",
                (parent, key, None if pages else salt),
            ).fetchone()
            if row is None:
                break
            identity = child_identity(identity, key)
            parent = int(row[0])
            pages.append(CachedPage(parent, int(row[1]), int(row[2]), identity))
        return pages

    def read(self, page: CachedPage) -> npt.NDArray[Any]:
        """The KV of a page.

        Returns:
            An array with the axes of `meta.fingerprint.layout`, of its dtype; of unsigned integers
            of the same size where numpy does not know that (bfloat16, float8).

        Raises:
            PageGone: it was evicted since, is damaged, or its file is missing.
        """
        segment, index = divmod(page.slot, self.meta.slots_per_segment)
        try:
            with open(self._directory / segment_name(segment), "rb", buffering=0) as file:
                data = os.pread(file.fileno(), self.meta.page_bytes, index * self.meta.slot_bytes)
        except OSError as error:
            raise PageGone(f"Slot {page.slot} cannot be read: {error.strerror}.") from None
        if len(data) < self.meta.page_bytes or page.checksum != page_checksum(page.identity, data):
            raise PageGone(f"Slot {page.slot} holds something else now, or is damaged.")
        return view_page(data, self.meta)

    def close(self) -> None:
        """Close the index."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def view_page(data: bytes, meta: Meta) -> npt.NDArray[Any]:
    """The bytes of a page as an array with the axes of its layout.

    Raises:
        NotACache: meta.json contradicts itself.
    """
    fingerprint = meta.fingerprint
    sizes = {
        "layer": fingerprint.num_layers,
        "kv": 2,
        "head": fingerprint.num_kv_heads,
        "token": fingerprint.page_size,
        "dim": fingerprint.head_dim,
    }
    axes = fingerprint.layout.split(",")
    count = math.prod(sizes.values())
    itemsize, rest = divmod(meta.page_bytes, count)
    if sorted(axes) != sorted(sizes) or rest or itemsize not in (1, 2, 4, 8):
        raise NotACache(
            f"Pages of {meta.page_bytes} bytes do not fit layout {fingerprint.layout!r} with "
            f"{count} numbers."
        )
    try:
        dtype = np.dtype(fingerprint.dtype)
    except TypeError:
        dtype = np.dtype(f"u{itemsize}")
    if dtype.itemsize != itemsize:
        raise NotACache(f"Numbers of {itemsize} bytes cannot be {fingerprint.dtype}.")
    return np.frombuffer(data, dtype=dtype).reshape([sizes[axis] for axis in axes])
