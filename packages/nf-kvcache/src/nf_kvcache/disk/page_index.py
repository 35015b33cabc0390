"""Which slot holds the KV of which tokens: a table in SQLite."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nf_kvcache.disk.format import (
    APPLICATION_ID,
    BLOCK_BYTES,
    FORMAT_VERSION,
    SCHEMA,
)

_ROWS_PER_TRANSACTION = 256
_ERRNO_BY_SQLITE_ERROR = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EMFILE,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
}


class DamagedIndex(ValueError):
    """The file is no index that can be read; says why."""


class PageRow(NamedTuple):
    """A page on disk; docs/kv-disk-format.md explains the columns."""

    id: int
    parent: int
    salt: bytes | None
    slot: int
    tokens: bytes
    checksum: int
    used: int


class PageIndex:
    """The index of a cache. One thread at a time.

    Args:
        path: the database; made if it is missing.
        index_bytes: the most that the database may grow to.
        log_bytes: the most that its write-ahead log may grow to.

    Raises:
        DamagedIndex: the file is damaged, or something else.
        OSError: the file cannot be opened or written.
    """

    def __init__(self, path: Path, index_bytes: int, log_bytes: int) -> None:
        self._path = path
        self._index_bytes = index_bytes
        self._log_bytes = log_bytes
        try:
            self._rows = self._open()
        except sqlite3.DatabaseError as error:
            if _is_damage(error):
                raise DamagedIndex(str(error)) from error
            raise os_error(error) from error
        self._inode = os.stat(path).st_ino

    def take_rows(self) -> list[PageRow]:
        """The pages that were there when this was opened, by id; handed over once."""
        rows, self._rows = self._rows, []
        return rows

    def last_id(self) -> int:
        """The highest id that was ever given."""
        row = self._connection.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = 'page'"
        ).fetchone()
        return 0 if row is None else int(row[0])

    def delete(self, ids: Sequence[int]) -> None:
        """Forget pages; those that are not there are none.

        Raises:
            OSError: as the other methods. What was done before is kept; it may be repeated.
        """
        self._apply("DELETE FROM page WHERE id = ?", [(row_id,) for row_id in ids])

    def add(self, rows: Sequence[PageRow]) -> None:
        """Record pages. What they hold must have reached the disk."""
        self._apply("INSERT OR REPLACE INTO page VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def set_used(self, stamps: Sequence[tuple[int, int]]) -> None:
        """Record (stamp, id): when pages were last used."""
        self._apply("UPDATE page SET used = ? WHERE id = ?", stamps)

    def close(self) -> None:
        """Bring the log into the database and close it."""
        try:
            self._connection.close()
        except sqlite3.Error as error:
            raise os_error(error) from error

    def _open(self) -> list[PageRow]:
        """Connect, and read everything, which also shows whether it is intact."""
        connection = sqlite3.connect(
            self._path, timeout=1.0, isolation_level=None, check_same_thread=False
        )
        try:
            application_id, version = (
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version")
            )
            is_new = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            if not is_new and (application_id, version) != (APPLICATION_ID, FORMAT_VERSION):
                raise _foreign("it is the database of something else")
            connection.execute("PRAGMA journal_mode = WAL")
            # A commit survives the end of the process; a power cut may take the last ones away.
            # What those said of slots that have been written since, the checksums disprove.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA max_page_count = {self._index_bytes // BLOCK_BYTES}")
            log_pages = self._log_bytes // BLOCK_BYTES
            connection.execute(f"PRAGMA wal_autocheckpoint = {max(1, log_pages // 4)}")
            connection.execute(f"PRAGMA journal_size_limit = {self._log_bytes // 2}")
            if is_new:
                connection.executescript(
                    f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; "
                    f"PRAGMA user_version = {FORMAT_VERSION}; {SCHEMA} COMMIT;"
                )
            rows = list(_read_rows(connection))
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return rows

    def _apply(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        """Execute a statement for each of the rows, in transactions of limited size."""
        for start in range(0, len(rows), _ROWS_PER_TRANSACTION):
            self._check_files()
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(statement, rows[start : start + _ROWS_PER_TRANSACTION])
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise os_error(error) from error

    def _check_files(self) -> None:
        """See that the files are still those that were opened, and that the log is not too long."""
        try:
            is_same = os.stat(self._path).st_ino == self._inode
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise FileNotFoundError(
                errno.ENOENT, "the index was deleted or replaced; restart to use the disk again"
            )
        log = Path(f"{self._path}-wal")
        if log.exists() and log.stat().st_size > self._log_bytes // 2:
            try:
                busy = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            except sqlite3.Error as error:
                raise os_error(error) from error
            if busy:
                raise OSError(errno.EBUSY, "a reader keeps the log of the index from being reused")


def _read_rows(connection: sqlite3.Connection) -> Iterator[PageRow]:
    for row in connection.execute(
        "SELECT id, parent, salt, slot, tokens, checksum, used FROM page ORDER BY id"
    ):
        page = PageRow(*row)
        if not (
            all(isinstance(page[column], int) for column in (0, 1, 3, 5, 6))
            and isinstance(page.tokens, bytes)
            and isinstance(page.salt, bytes | None)
        ):
            raise _foreign(f"row {page.id} has a value of a wrong type")
        yield page


def _foreign(why: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(why)
    error.sqlite_errorcode = sqlite3.SQLITE_NOTADB
    return error


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is at fault, not the circumstances."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    # SQLITE_ERROR: a table or column is missing.
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


def os_error(error: sqlite3.Error) -> OSError:
    """The same as the operating system would say it."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR) & 0xFF
    return OSError(_ERRNO_BY_SQLITE_ERROR.get(code, errno.EIO), f"the index: {error}")
