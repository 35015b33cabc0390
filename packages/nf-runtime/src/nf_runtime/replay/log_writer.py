"""Writes a replay log."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nf_runtime.replay.log_format import FLOAT64, HEADER, MAGIC, UINT32, VERSION, LogEnd, Tag

_log = logging.getLogger(__name__)

_LAST_BYTES = 16  # kept free for the entry that says why the log ends


class LogWriter:
    """Writes a log to a file that does not grow beyond a bound.

    Entries are collected in memory; `flush` hands them to the system, which keeps them if the
    process dies. When the file is full or cannot be written, the log ends, and what is appended
    after that is dropped: the engine goes on without it.

    Args:
        path: To create, in `begin`.
        max_bytes: Bound of the file.

    Attributes:
        is_open: Whether the log goes on.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.is_open = True
        self._path = path
        self._left = max_bytes - _LAST_BYTES
        self._buffer = bytearray()
        self._file: io.FileIO | None = None

    def begin(self, header: dict[str, Any]) -> None:
        """Create the file, for nobody else to read, and write the header.

        Entries that were appended before follow it.

        Raises:
            OSError: It cannot be created.
        """
        entries = self._buffer
        data = json.dumps(header).encode()
        self._buffer = bytearray(HEADER.pack(MAGIC, VERSION, len(data)) + data)
        self._file = io.FileIO(
            os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb"
        )
        self.flush()
        self._buffer = entries
        self.flush()

    def tag(self, tag: Tag) -> None:
        """Begin an entry."""
        self._buffer.append(tag)

    def number(self, value: int) -> None:
        """Append an integer, 0 or more."""
        buffer = self._buffer
        while value > 0x7F:
            buffer.append(value & 0x7F | 0x80)
            value >>= 7
        buffer.append(value)

    def signed(self, value: int) -> None:
        """Append an integer."""
        self.number(value << 1 if value >= 0 else (-value << 1) - 1)

    def numbers(self, values: Sequence[int]) -> None:
        """Append how many, and integers of 0 or more."""
        self.number(len(values))
        for value in values:
            self.number(value)

    def text(self, value: str) -> None:
        """Append a text."""
        data = value.encode()
        self.number(len(data))
        self._buffer += data

    def seconds(self, value: float) -> None:
        """Append a time, bit for bit."""
        self._buffer += FLOAT64.pack(value)

    def word(self, value: int) -> None:
        """Append 32 bits."""
        self._buffer += UINT32.pack(value)

    def array(self, values: np.ndarray) -> None:
        """Append how many, and int32 numbers."""
        self.number(len(values))
        self._buffer += values.astype("<i4", copy=False).tobytes()

    def flush(self) -> None:
        """Hand what was appended to the system; to be called between two commands."""
        if self._file is None:
            return
        if self.is_open and len(self._buffer) > self._left:
            _log.warning("%s is full; what comes from here on is not in it", self._path)
            self._buffer.clear()
            self.close(LogEnd.FULL)
        if self.is_open:
            self._left -= len(self._buffer)
            self._write()
        self._buffer.clear()

    def close(self, end: LogEnd) -> None:
        """End the log, and say why."""
        if not self.is_open:
            return
        self.tag(Tag.END)
        self.number(end)
        self._write()
        self._stop()

    def _write(self) -> None:
        if self._file is None:
            return
        reason = "there is no room"
        try:
            if self._file.write(self._buffer) == len(self._buffer):
                return
        except OSError as error:
            reason = str(error.strerror)
        _log.warning("%s cannot be written, and ends here: %s", self._path, reason)
        self._stop()

    def _stop(self) -> None:
        self.is_open = False
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
