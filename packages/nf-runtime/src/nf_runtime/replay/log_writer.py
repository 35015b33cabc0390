"""Writes a replay log."""

import contextlib
import json
import logging
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
        path: To create.
        max_bytes: Bound of the file.

    Attributes:
        is_open: Whether the log goes on.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.is_open = True
        self._path = path
        self._left = max_bytes - _LAST_BYTES
        self._buffer = bytearray()
        self._has_header = False
        self._file = path.open("xb", buffering=0)

    def begin(self, header: dict[str, Any]) -> None:
        """Write the header. Entries that were appended before follow it."""
        data = json.dumps(header).encode()
        self._buffer[:0] = HEADER.pack(MAGIC, VERSION, len(data)) + data
        self._has_header = True
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
        if not self._has_header:
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
        try:
            self._file.write(self._buffer)
        except OSError as error:
            _log.warning("%s cannot be written, and ends here: %s", self._path, error.strerror)
            self._stop()

    def _stop(self) -> None:
        self.is_open = False
        with contextlib.suppress(OSError):
            self._file.close()
