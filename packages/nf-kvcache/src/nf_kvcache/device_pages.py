"""Pages on the device."""

from __future__ import annotations

import numpy as np
import torch

from nf_kvcache.copier import Layer
from nf_kvcache.index import PrefixIndex
from nf_kvcache.layout import KVLayout
from nf_kvcache.page_pool import PagePool
from nf_kvcache.tier import Tier


class DevicePages:
    """The device tier: its tensors, which pages are in use, and what the others hold.

    Args:
        layout: shape of a page.
        num_pages: pages to give out.
        spare_pages: pages to allocate behind them.
        device: where.
        index: which learns of pages that are given to somebody else.

    Attributes:
        layers: for every layer its K and its V, each [num_pages + spare_pages, num_kv_heads,
            page_size, head_dim]; zero at first.
        pool: reference counts.
        nodes: by page, the prefix whose KV it holds.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        spare_pages: int,
        device: torch.device,
        index: PrefixIndex,
    ) -> None:
        shape = (num_pages + spare_pages, *layout.page_shape)
        self.layers: list[Layer] = [
            (
                torch.zeros(shape, dtype=layout.dtype, device=device),
                torch.zeros(shape, dtype=layout.dtype, device=device),
            )
            for _ in range(layout.num_layers)
        ]
        self.pool = PagePool(num_pages, self._evict)
        self.nodes: dict[int, int] = {}
        self._index = index

    def place(self, node: int, page: int) -> None:
        """Say that `page` holds the KV of `node`. If another page does already, that one stays."""
        if self._index.page(node, Tier.DEVICE) < 0:
            self._index.place(node, Tier.DEVICE, page)
            self.nodes[page] = node

    def placed(self, nodes: np.ndarray, pages: np.ndarray) -> None:
        """Take notice that the index knows some pages, int32 [n], by their nodes, int64 [n]."""
        self.nodes.update(zip(pages.tolist(), nodes.tolist(), strict=True))

    def displace(self, page: int) -> None:
        """Say that what `page` holds is not to be found any more, if it was."""
        node = self.nodes.pop(page, None)
        if node is not None:
            self._index.displace(node, Tier.DEVICE)

    def check_integrity(self) -> None:
        """Compare pages and index.

        Raises:
            RuntimeError: names the page that does not agree.
        """
        self.pool.check_integrity()
        for page, node in self.nodes.items():
            if not self._index.is_alive(node) or self._index.page(node, Tier.DEVICE) != page:
                raise RuntimeError(
                    f"The KV cache is broken: page {page} is not what its prefix says."
                )
        for page in range(self.pool.num_pages):
            if self.pool.is_idle(page) and page not in self.nodes:
                raise RuntimeError(
                    f"The KV cache is broken: page {page} is kept, but cannot be found."
                )

    def _evict(self, page: int) -> None:
        self.displace(page)
