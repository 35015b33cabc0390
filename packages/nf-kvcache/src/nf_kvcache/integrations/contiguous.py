"""Between pages and the K and V of engines that keep a sequence in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nf_kvcache.copier import Layer
from nf_kvcache.kv_cache import KVCache
from nf_kvcache.prefix_match import PrefixMatch
from nf_kvcache.tier import Tier

_SEQ = "sequence"
"""The only one: it begins and ends within each call."""

_FLUSH_SECONDS = 10.0


class ContiguousKV:
    """Copies K and V of a sequence out of the pages of a cache, and into them.

    No page is in use between two calls, so all of the device serves each of them.

    Args:
        cache: that nobody else uses.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._device = cache.layers[0][0].device
        # The host takes so many pages at once, and has room for more when they are on disk.
        lower = cache.stats().lower
        self._burst = cache.num_pages if lower is None else max(1, lower.host_pages_total // 2)

    def read(self, token_ids: np.ndarray) -> tuple[PrefixMatch, list[Layer]]:
        """Copy the longest prefix that is found, and that the device has room for.

        Args:
            token_ids: int32 [n].

        Returns:
            What was found and has come; K and V of each layer, [num_kv_heads, match.num_tokens,
            head_dim], or no layers if it is nothing.
        """
        cache = self._cache
        match = cache.match(token_ids)
        match = match.first(min(len(match.nodes), self._room()), cache.page_size)
        if not match.num_tokens:
            return match, []
        cache.reserve(_SEQ, match.num_tokens, match)
        try:
            while (came := cache.restored(_SEQ)) is None:
                cache.wait(0.1)
            pages = self._pages(0, came.num_tokens // cache.page_size)
            return came, [
                (_join(keys[pages]), _join(values[pages])) for keys, values in cache.layers
            ]
        finally:
            cache.release(_SEQ)

    def write(self, token_ids: np.ndarray, layers: Sequence[Layer]) -> int:
        """Keep the full pages of a sequence, as many as the device has room for.

        Args:
            token_ids: int32 [n].
            layers: K and V of each layer, [num_kv_heads, n, head_dim].

        Returns:
            Tokens in those pages.
        """
        cache, page_size = self._cache, self._cache.page_size
        match = cache.match(token_ids)
        # The first page that is not on the device. If it is in a lower tier, it is not brought up,
        # but written again: everything is at hand.
        start = int(np.append(match.pages[:, Tier.DEVICE], -1).argmin())
        stop = min(len(token_ids) // page_size, self._room())
        if start < stop:
            cache.reserve(_SEQ, stop * page_size, match.first(start, page_size))
            try:
                for first in range(start, stop, self._burst):
                    if first > start:
                        cache.flush(_FLUSH_SECONDS)
                    self._write_pages(token_ids, layers, first, min(stop, first + self._burst))
            finally:
                cache.release(_SEQ)
        return stop * page_size

    def _write_pages(
        self, token_ids: np.ndarray, layers: Sequence[Layer], start: int, stop: int
    ) -> None:
        """Fill and commit the pages at these positions."""
        cache, page_size = self._cache, self._cache.page_size
        tokens = slice(start * page_size, stop * page_size)
        pages = self._pages(start, stop)
        offload = cache.begin_iteration(
            [_SEQ], np.array([tokens.start]), np.array([tokens.stop - tokens.start])
        )
        try:
            for layer, (keys, values) in enumerate(layers):
                if offload is not None:
                    offload.before_append(layer)
                for target, data in zip(cache.layers[layer], (keys, values), strict=True):
                    target[pages] = _cut(data[:, tokens], page_size).to(self._device)
                if offload is not None:
                    offload.after_append(layer)
        except BaseException:
            if offload is not None:
                offload.abandon()
            raise
        cache.commit(_SEQ, token_ids[tokens])

    def _pages(self, start: int, stop: int) -> Tensor:
        """Pages of the sequence at these positions: int64 [stop - start]."""
        table = self._cache.page_tables([_SEQ])[0, start:stop]
        return torch.from_numpy(table).to(self._device, torch.int64)

    def _room(self) -> int:
        """Pages that a sequence can have."""
        stats = self._cache.stats()
        return stats.pages_total - stats.pages_used


def _join(pages: Tensor) -> Tensor:
    """[pages, heads, page_size, head_dim] to [heads, tokens, head_dim]."""
    return pages.transpose(0, 1).flatten(1, 2)


def _cut(tokens: Tensor, page_size: int) -> Tensor:
    """The inverse of `_join`."""
    heads, _, head_dim = tokens.shape
    return tokens.reshape(heads, -1, page_size, head_dim).transpose(0, 1)
