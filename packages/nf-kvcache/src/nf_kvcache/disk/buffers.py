"""Memory that O_DIRECT can read from and write to."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from nf_kvcache.disk.format import BLOCK_BYTES


def aligned_buffers(count: int, slot_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory for pages: uint8 [count, slot_bytes], zero, every row at a multiple of 4096 bytes.

    Raises:
        ValueError: slot_bytes is not a multiple of 4096.
    """
    if slot_bytes % BLOCK_BYTES:
        raise ValueError(f"slot_bytes is {slot_bytes}; expected a multiple of {BLOCK_BYTES}.")
    memory = mmap.mmap(-1, max(1, count * slot_bytes))
    return np.frombuffer(memory, dtype=np.uint8, count=count * slot_bytes).reshape(
        count, slot_bytes
    )


def check_buffer(buffer: npt.NDArray[np.uint8], slot_bytes: int) -> None:
    """See that a page can be written from it or read into it.

    Raises:
        ValueError: it has a wrong type, size or alignment.
    """
    if (
        buffer.dtype != np.uint8
        or buffer.shape != (slot_bytes,)
        or not buffer.flags.c_contiguous
        or buffer.ctypes.data % BLOCK_BYTES
    ):
        raise ValueError(
            f"A buffer is {buffer.dtype} {list(buffer.shape)}; expected contiguous uint8 "
            f"[{slot_bytes}] at an address that is a multiple of {BLOCK_BYTES}."
        )
