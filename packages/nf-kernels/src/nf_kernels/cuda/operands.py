"""The operands of the CUDA library's functions: what they may be, as its kernels read them.

Every check raises a ValueError that names the argument, what it is and what was expected.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nf_kernels.cuda import sources

DTYPES = {getattr(torch, name): code for code, name in enumerate(sources.DTYPES)}
"""The library's code of each dtype."""

VECTOR_ELEMENTS, VECTOR_BYTES = 8, 16
"""What is read and written at a time."""


def describe(tensor: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{tensor.dtype} {list(tensor.shape)}"


def stride(rows: Tensor) -> int:
    """Elements from one row to the next; of a single row its own, as torch gives that any."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def check_rows(
    name: str, rows: Tensor, dtype: torch.dtype, count: int | None, width: int | None
) -> tuple[int, int]:
    """Check the dtype and layout of a matrix, any size for None; gives its shape."""
    expected = f"[{'any' if count is None else count}, {'any' if width is None else width}]"
    fits = rows.dim() == 2 and count in (None, rows.shape[0]) and width in (None, rows.shape[1])
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype}; expected torch.bfloat16 or torch.float16")
    if rows.dtype != dtype or not fits:
        raise ValueError(f"{name} is {describe(rows)}; expected {dtype} {expected}")
    if rows.shape[1] % VECTOR_ELEMENTS:
        raise ValueError(
            f"{name} has rows of {rows.shape[1]}; expected a multiple of {VECTOR_ELEMENTS}"
        )
    if name != "out" and not rows.shape[1]:
        raise ValueError(f"{name} has rows of 0; expected at least {VECTOR_ELEMENTS}")
    if rows.shape[1] and rows.stride(1) != 1:
        raise ValueError(
            f"{name} has stride {rows.stride(1)} in its last dimension; expected 1, "
            f"make it contiguous"
        )
    if stride(rows) < rows.shape[1] or stride(rows) % VECTOR_ELEMENTS:
        raise ValueError(
            f"{name} has rows {stride(rows)} elements apart; expected a multiple of "
            f"{VECTOR_ELEMENTS} and at least {rows.shape[1]}"
        )
    return rows.shape[0], rows.shape[1]


def check_addresses(operands: dict[str, Tensor]) -> None:
    """Check that each operand, by name, begins at a multiple of `VECTOR_BYTES`."""
    for name, tensor in operands.items():
        if tensor.data_ptr() % VECTOR_BYTES:
            raise ValueError(
                f"{name} begins {tensor.data_ptr() % VECTOR_BYTES} bytes after a multiple of "
                f"{VECTOR_BYTES}; expected none, begin a view at another element"
            )


def check_devices(operands: dict[str, Tensor]) -> None:
    """Check that the operands, by name, are on one CUDA device."""
    first = next(iter(operands.values())).device
    for name, tensor in operands.items():
        if tensor.device.type != "cuda" or tensor.device != first:
            raise ValueError(
                f"{name} is on {tensor.device}; expected all of {', '.join(operands)} on one "
                f"CUDA device"
            )


def check_workspace(workspace: Tensor | None, needed: int, device: torch.device) -> None:
    """Check that there are `needed` bytes, aligned, on the device."""
    if workspace is None:
        raise ValueError(
            f"workspace is None; expected uint8 [{needed}] or more, see workspace_bytes"
        )
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or workspace.shape[0] < needed:
        raise ValueError(
            f"workspace is {describe(workspace)}; expected torch.uint8 [{needed}] or more"
        )
    if not workspace.is_contiguous() or workspace.device != device:
        raise ValueError(
            f"workspace is on {workspace.device} with stride {workspace.stride(0)}; "
            f"expected contiguous memory on {device}"
        )
    check_addresses({"workspace": workspace})


def check_sm_count(sm_count: int, device: torch.device) -> int:
    """Check a number of SMs, 0 for all; gives how many these are."""
    available = device_sms(device)
    if not 0 <= sm_count <= available:
        raise ValueError(
            f"sm_count is {sm_count}; expected 1 to {available}, the SMs of {device}, or 0 for all"
        )
    return sm_count or available


@functools.cache
def device_sms(device: torch.device) -> int:
    """The SMs of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
