"""Rows where the CUDA libraries read and write them: at multiples of 16 bytes."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; FlashInfer and CUTLASS read and write so many at a time."""


def is_aligned(rows: Tensor) -> bool:
    """Whether every row of [T, W], or [E, T, W], begins at a multiple of `ALIGNMENT`."""
    return rows.data_ptr() % ALIGNMENT == 0 and all(
        count < 2 or stride * rows.element_size() % ALIGNMENT == 0
        for count, stride in zip(rows.shape[:-1], rows.stride(), strict=False)
    )


def to_read(rows: Tensor) -> Tensor:
    """The rows [T, W], or an aligned copy of them without gaps."""
    return rows if is_aligned(rows) else rows.clone(memory_format=torch.contiguous_format)


def to_write(rows: Tensor, *, contiguous: bool = False) -> Tensor:
    """Where to write rows [T, W]: they themselves, or aligned memory for `finish` to copy from.

    Args:
        rows: What is to be written.
        contiguous: Whether there may be no gaps between rows.
    """
    if is_aligned(rows) and (rows.is_contiguous() or not contiguous):
        return rows
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def finish(rows: Tensor, written: Tensor) -> None:
    """Copy what was written in place of the rows, if it was not they: both [T, W]."""
    if written is not rows:
        rows.copy_(written)
