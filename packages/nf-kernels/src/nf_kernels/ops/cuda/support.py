"""What computes on a CUDA device, if it is there, and which shapes and dtypes it takes."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from nf_kernels.ops.cuda.aligned_rows import ALIGNMENT

_MAX_THREADS = 1024  # of a block


def flashinfer() -> Any:
    """The module.

    Raises:
        RuntimeError: It is not installed, or does not load.
    """
    module, reason = _find_flashinfer()
    if module is None:
        raise RuntimeError(f"CUDA operations need FlashInfer: {reason}")
    return module


@functools.cache
def _find_flashinfer() -> tuple[Any, str]:
    """The module, or None and why."""
    try:
        return importlib.import_module("flashinfer"), ""
    except ModuleNotFoundError as error:
        return None, f"{error}; install it with: pip install 'nf-kernels[cuda]'"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"it does not load: {error}"


def missing(device: torch.device) -> str:
    """Why the CUDA operations cannot be used on a device; empty where they can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return _find_flashinfer()[1]


def takes_rows(dtype: torch.dtype, *widths: int) -> bool:
    """Whether FlashInfer takes rows of so many elements; of none it makes no sense."""
    return dtype.itemsize == 2 and all(
        width > 0 and width * dtype.itemsize % ALIGNMENT == 0 for width in widths
    )


def takes_rope(dtype: torch.dtype, kv_heads: int, head_dim: int) -> bool:
    """Whether FlashInfer rotates and appends such heads."""
    threads = min(head_dim // 8, 32) * kv_heads
    return takes_rows(dtype) and head_dim in (64, 128, 256, 512) and threads <= _MAX_THREADS


def takes_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashInfer attends over such heads."""
    return takes_rows(dtype) and head_dim in (64, 128, 256)


def takes_grouped(dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch's grouped product takes rows of so many elements."""
    return dtype == torch.bfloat16 and takes_rows(dtype, *widths)
