"""Pages in the memory of the host."""

from __future__ import annotations

import logging

import numpy as np
import torch

from nf_kvcache.layout import KVLayout
from nf_kvcache.numa import place_near
from nf_kvcache.page_pool import PagePool

_log = logging.getLogger(__name__)

ALIGNMENT = 4096
"""Bytes; pages begin at multiples of it, so that they can be read and written without the cache of
the file system."""


class HostTier:
    """One piece of memory, cut into pages.

    A page is [num_layers, 2 (K, V), num_kv_heads, page_size, head_dim], all layers in one piece.

    Args:
        layout: shape of a page.
        max_bytes: bound of the memory.
        device: whose pages come here; a CUDA device wants the memory pinned and near.

    Attributes:
        pool: which pages are in use. A referenced page is being written or read.
        page_bytes: bytes of a page.
        slot_bytes: bytes from one page to the next.
        num_bytes: of all pages.
        placement: where the memory is.

    Raises:
        ValueError: `max_bytes` is less than one page.
    """

    def __init__(
        self,
        layout: KVLayout,
        max_bytes: int,
        *,
        device: torch.device,
    ) -> None:
        self.page_bytes = layout.bytes_per_page
        self.slot_bytes = -(-layout.bytes_per_page // ALIGNMENT) * ALIGNMENT
        num_pages = max_bytes // self.slot_bytes
        if num_pages < 1:
            raise ValueError(
                f"host_bytes is {max_bytes}, and a page takes {self.slot_bytes}; expected room for "
                "one page at least."
            )
        self.num_bytes = num_pages * self.slot_bytes
        raw = torch.empty(self.num_bytes + ALIGNMENT, dtype=torch.uint8)
        start = -raw.data_ptr() % ALIGNMENT
        self._storage = raw[start : start + self.num_bytes]
        self.placement = place_near(self._storage, device)
        self._registered = device.type == "cuda"
        if self._registered:
            _pin(self._storage)
        rows = self._storage.numpy().reshape(num_pages, self.slot_bytes)
        self._slots = rows
        self._pages = rows[:, : layout.bytes_per_page].reshape(num_pages, layout.num_layers, 2, -1)
        if not np.shares_memory(self._pages, rows):
            raise RuntimeError("The pages of the host tier are a copy of its memory.")
        self.pool = PagePool(num_pages)
        _log.info(
            "host tier: %d pages, %.1f MiB, %s", num_pages, self.num_bytes / 2**20, self.placement
        )

    def page(self, page: int, layers: slice = slice(None)) -> np.ndarray:
        """Some layers of a page: uint8 [layers, 2, bytes of K, and of V, of a page in a layer]."""
        view: np.ndarray = self._pages[page, layers]
        return view

    def slot(self, page: int) -> np.ndarray:
        """All bytes of a page and of the gap behind it: uint8 [slot_bytes], aligned."""
        view: np.ndarray = self._slots[page]
        return view

    def close(self) -> None:
        """Give the memory back; no copy may be under way."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._storage.data_ptr())
            self._registered = False


def _pin(storage: torch.Tensor) -> None:
    """Pin memory in place. Torch's own pinned memory is rounded up to a power of two."""
    error = torch.cuda.cudart().cudaHostRegister(storage.data_ptr(), storage.numel(), 0)
    if int(error) != 0:
        raise RuntimeError(
            f"{storage.numel()} bytes for the host tier could not be pinned (CUDA error "
            f"{int(error)}); lower host_bytes or raise the limit of locked memory (ulimit -l)."
        )
