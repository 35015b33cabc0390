"""Reads a replay log."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nf_runtime.errors import NanoFlowError
from nf_runtime.replay.log_format import FLOAT64, HEADER, MAGIC, UINT32, VERSION, Tag


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
        if len(data) < HEADER.size or not data.startswith(MAGIC):
            raise NanoFlowError(f"{path} is no replay log; expected a file of --replay-log-dir")
        _, version, length = HEADER.unpack_from(data)
        if version != VERSION:
            raise NanoFlowError(
                f"{path} is a replay log of version {version}, and this is NanoFlow for version "
                f"{VERSION}; replay it with the NanoFlow that wrote it"
            )
        try:
            self.header: dict[str, Any] = json.loads(data[HEADER.size : HEADER.size + length])
        except ValueError as error:
            raise NanoFlowError(f"{path} is damaged: its header is no JSON") from error
        self.position: int = HEADER.size + length
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
        value: float = FLOAT64.unpack(self._take(8))[0]
        return value

    def word(self) -> int:
        """Read what `LogWriter.word` wrote."""
        value: int = UINT32.unpack(self._take(4))[0]
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
