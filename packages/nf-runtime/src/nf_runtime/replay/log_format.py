"""The file of a replay log: a header, then what an engine was told and asked, in order.

    magic "NFRL", version (1 byte), length of the header (uint32 LE), header (JSON, UTF-8), entries

An entry is a tag (1 byte) and what `LogWriter` and `LogReader` agree on behind it. Integers are
unsigned LEB128, signed ones in zigzag, texts their length and UTF-8. A file that ends in the middle
of an entry is the log of a process that was killed; what is complete counts.
"""

import contextlib
import json
import logging
import struct
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from nf_runtime.errors import NanoFlowError

_log = logging.getLogger(__name__)

SUFFIX = ".replay"
"""How the names of logs end."""

_MAGIC = b"NFRL"
_VERSION = 1
_HEADER = struct.Struct("<4sBI")
_UINT32 = struct.Struct("<I")
_FLOAT64 = struct.Struct("<d")
_LAST_BYTES = 16  # kept free for the entry that says why the log ends


class Tag(IntEnum):
    """What an entry is. First the commands, then what is asked or told in the course of one."""

    ADD = ord("A")
    """A request is added."""
    ABORT = ord("X")
    """A request is aborted."""
    STEP = ord("S")
    """The loop does a step."""
    SETTLE = ord("T")
    """The loop commits an iteration and starts none."""
    FAIL = ord("F")
    """The loop ends what is in flight."""
    SYNC = ord("P")
    """The pages are asked whether something is on its way."""
    END = ord(".")
    """The log ends here, and why."""

    REFUSED = ord("N")
    """The request was not taken."""
    CLOCK = ord("C")
    """The time."""
    EVENT = ord("E")
    """Whether a copy has ended."""
    DISK_PAGES = ord("G")
    """What the disk holds at the start."""
    DISK_BUSY = ord("B")
    """Whether the disk takes a page."""
    DISK_WRITE = ord("W")
    """The slot that a page goes to."""
    DISK_READ = ord("R")
    """Whether a read has ended."""
    DISK_POLL = ord("D")
    """What the disk has done."""
    LAUNCH = ord("L")
    """A digest of a batch and its page tables."""
    RESULT = ord("Q")
    """The sampled ids."""
    UNLAUNCHED = ord("Y")
    """The iteration could not be launched."""
    FAILED = ord("Z")
    """The iteration failed, in place of a result."""
    OUTCOME = ord("O")
    """A digest of what a command gave."""


COMMANDS = frozenset((Tag.ADD, Tag.ABORT, Tag.STEP, Tag.SETTLE, Tag.FAIL, Tag.SYNC, Tag.END))


class LogEnd(IntEnum):
    """Why a log ends."""

    CLOSED = 0
    """The engine was shut down."""
    FULL = 1
    """It has reached its bound."""
    INTERRUPTED = 2
    """Something broke into a step where no log can say when, such as Ctrl-C."""
    CUT = 3
    """It just ends: the process was killed."""


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
        self._buffer[:0] = _HEADER.pack(_MAGIC, _VERSION, len(data)) + data
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
        self._buffer += _FLOAT64.pack(value)

    def word(self, value: int) -> None:
        """Append 32 bits."""
        self._buffer += _UINT32.pack(value)

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


class LogReader:
    """Reads a log, entry by entry.

    Args:
        path: Of the log.

    Attributes:
        header: What the engine was.
        position: In the file, bytes.

    Raises:
        NanoFlowError: It cannot be read, is no replay log, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise NanoFlowError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) < _HEADER.size or not data.startswith(_MAGIC):
            raise NanoFlowError(f"{path} is no replay log; expected a file of --replay-log-dir")
        _, version, length = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise NanoFlowError(
                f"{path} is a replay log of version {version}, and this is NanoFlow for version "
                f"{_VERSION}; replay it with the NanoFlow that wrote it"
            )
        try:
            self.header: dict[str, Any] = json.loads(data[_HEADER.size : _HEADER.size + length])
        except ValueError as error:
            raise NanoFlowError(f"{path} is damaged: its header is no JSON") from error
        self.position: int = _HEADER.size + length
        self._path = path
        self._data = data

    @property
    def size(self) -> int:
        """Of the file, bytes."""
        return len(self._data)

    def next_tag(self) -> Tag | None:
        """What the next entry is; None at the end of the file.

        Raises:
            NanoFlowError: It is nothing that is known.
        """
        if self.position >= len(self._data):
            return None
        try:
            return Tag(self._data[self.position])
        except ValueError as error:
            raise NanoFlowError(
                f"{self._path} is damaged at byte {self.position}: there is no entry of the kind "
                f"{self._data[self.position]}"
            ) from error

    def skip_tag(self) -> None:
        """Go on behind the tag of an entry."""
        self.position += 1

    def number(self) -> int:
        """Read what `LogWriter.number` wrote."""
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def signed(self) -> int:
        """Read what `LogWriter.signed` wrote."""
        value = self.number()
        return value >> 1 if not value & 1 else -(value + 1 >> 1)

    def numbers(self) -> list[int]:
        """Read what `LogWriter.numbers` wrote."""
        return [self.number() for _ in range(self.number())]

    def text(self) -> str:
        """Read what `LogWriter.text` wrote."""
        return self._take(self.number()).decode()

    def seconds(self) -> float:
        """Read what `LogWriter.seconds` wrote."""
        value: float = _FLOAT64.unpack(self._take(8))[0]
        return value

    def word(self) -> int:
        """Read what `LogWriter.word` wrote."""
        value: int = _UINT32.unpack(self._take(4))[0]
        return value

    def array(self) -> np.ndarray:
        """Read what `LogWriter.array` wrote: int32 [n]."""
        return np.frombuffer(self._take(4 * self.number()), dtype="<i4").astype(np.int32)

    def _take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            EOFError: The file ends before.
        """
        start, self.position = self.position, self.position + count
        if self.position > len(self._data):
            self.position = len(self._data)
            raise EOFError
        return self._data[start : self.position]
