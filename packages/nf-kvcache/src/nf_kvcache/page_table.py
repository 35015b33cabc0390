"""The pages of every sequence, as the attention kernels read them."""

from __future__ import annotations

import numpy as np


class PageTable:
    """One growing int32 array with a row of page numbers per sequence; unused entries are 0."""

    def __init__(self) -> None:
        self._pages = np.zeros((16, 16), dtype=np.int32)
        self._lengths = np.zeros(16, dtype=np.int32)
        self._free = list(range(15, -1, -1))

    def add_row(self) -> int:
        """Take an empty row."""
        if not self._free:
            rows, width = self._pages.shape
            self._pages = np.concatenate((self._pages, np.zeros((rows, width), dtype=np.int32)))
            self._lengths = np.concatenate((self._lengths, np.zeros(rows, dtype=np.int32)))
            self._free.extend(range(2 * rows - 1, rows - 1, -1))
        return self._free.pop()

    def remove_row(self, row: int) -> None:
        """Give back a row."""
        self._pages[row, : self._lengths[row]] = 0
        self._lengths[row] = 0
        self._free.append(row)

    def append(self, row: int, pages: list[int]) -> None:
        """Add pages at the end of a row."""
        start = int(self._lengths[row])
        stop = start + len(pages)
        self._widen(stop)
        self._pages[row, start:stop] = pages
        self._lengths[row] = stop

    def append_one(self, rows: np.ndarray, pages: list[int]) -> None:
        """Add one page at the end of each of some rows, intp [n]."""
        ends = self._lengths[rows]
        self._widen(int(ends.max(initial=-1)) + 1)
        self._pages[rows, ends] = pages
        self._lengths[rows] = ends + 1

    def _widen(self, width: int) -> None:
        """Make room for so many pages in a row."""
        rows, now = self._pages.shape
        if width > now:
            wider = np.zeros((rows, max(width, 2 * now)), dtype=np.int32)
            wider[:, :now] = self._pages
            self._pages = wider

    def replace(self, row: int, position: int, page: int) -> None:
        """Put another page at a position of a row."""
        self._pages[row, position] = page

    def length(self, row: int) -> int:
        """Pages in a row."""
        return int(self._lengths[row])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Pages in each of some rows, int32."""
        lengths: np.ndarray = self._lengths[rows]
        return lengths

    def at(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The page at one position of each of some rows, int32."""
        pages: np.ndarray = self._pages[rows, positions]
        return pages

    def pages(self, row: int, start: int = 0, stop: int | None = None) -> list[int]:
        """The pages in a row, from position `start` on, up to `stop`."""
        length = self._lengths[row]
        pages: list[int] = self._pages[row, start : length if stop is None else stop].tolist()
        return pages

    def gather(self, rows: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        """Copy rows, intp [n], into `out`, or into a new array as wide as the longest of them.

        Raises:
            ValueError: `out` is not int32 [len(rows), width] with room for the longest row.
        """
        width = int(self._lengths[rows].max(initial=0))
        if out is None:
            pages: np.ndarray = self._pages[rows, :width]
            return pages
        if out.dtype != np.int32 or out.ndim != 2 or len(out) != len(rows) or out.shape[1] < width:
            raise ValueError(
                f"out is {out.dtype} {out.shape}; expected int32 ({len(rows)}, {width} or more)."
            )
        out[:, :width] = self._pages[rows, :width]
        out[:, width:] = 0
        return out
