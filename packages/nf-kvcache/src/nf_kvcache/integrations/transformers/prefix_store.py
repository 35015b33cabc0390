"""What is kept for a model from call to call, and from process to process."""

from __future__ import annotations

import inspect
import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nf_kvcache.copier import Layer
from nf_kvcache.disk import DiskTier
from nf_kvcache.integrations.contiguous import ContiguousKV
from nf_kvcache.integrations.transformers.model import fingerprint, probe, require_supported
from nf_kvcache.integrations.transformers.prefix_cache import PrefixCache
from nf_kvcache.kv_cache import KVCache
from nf_kvcache.stats import KVCacheStats
from nf_kvcache.tier import Tier

_log = logging.getLogger(__name__)


class PrefixStore:
    """K and V of what a model has read and written: on its device, on the host and on disk.

    While it is open it watches the forward passes of the model, so that it knows which tokens K and
    V belong to. The weights must not change meanwhile. Not thread-safe.

    Args:
        model: a decoder, whose attention is full and causal in all layers. A few tokens
            are computed to see what K and V look like, and all weights are read if there is a disk.
        device_bytes: memory on the device of the model, besides what the sequence at work takes. Of
            a longer sequence than it has room for, only the beginning is kept.
        host_bytes: memory of the host; 0 for none.
        disk_directory: where pages are kept for other processes. Models can share it, but only one
            process at a time has the pages of a model. None for no disk.
        disk_bytes: which the files of this model never exceed. Pages go to the disk through the
            memory of the host.
        page_size: tokens in a page. Whole pages are kept and found.

    Attributes:
        config: of the model.
        dtype: of K and V.

    Raises:
        CacheInUse: another process has the pages of this model in `disk_directory`.
        OSError: the directory cannot be made, read or written.
        TypeError: `model` is not a PreTrainedModel.
        ValueError: an argument is out of range; or K and V of a token of this model depend on more
            than that token and those before it, or are not all of one shape.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device_bytes: int = 2**30,
        host_bytes: int = 2**30,
        disk_directory: str | os.PathLike[str] | None = None,
        disk_bytes: int | None = None,
        page_size: int = 16,
    ) -> None:
        if (disk_directory is None) != (disk_bytes is None):
            raise ValueError(
                f"disk_directory is {disk_directory!r} and disk_bytes is {disk_bytes!r}; expected "
                "both or neither: what is on disk always has a bound."
            )
        require_supported(model)
        layout, self._devices = probe(model, page_size)
        self.config = model.config
        self.dtype = layout.dtype
        if device_bytes < layout.bytes_per_page:
            raise ValueError(
                f"device_bytes is {device_bytes}, and a page takes {layout.bytes_per_page}; "
                "expected room for one page at least."
            )
        with ExitStack() as opened:
            disk = None
            if disk_directory is not None and disk_bytes is not None:
                disk = DiskTier(
                    disk_directory,
                    fingerprint(model, layout),
                    page_bytes=layout.bytes_per_page,
                    page_size=page_size,
                    max_bytes=disk_bytes,
                    # The pages of a sequence come all at once; what waits is on the host.
                    max_queued_pages=max(1, host_bytes // layout.bytes_per_page),
                )
                opened.callback(disk.close)
            self._cache = KVCache(
                layout,
                device_bytes // layout.bytes_per_page,
                device=self._devices[0],
                host_bytes=host_bytes,
                disk=disk,
                restore_seconds=10.0,  # generate has nothing else to do meanwhile
            )
            opened.pop_all()
        self._contiguous = ContiguousKV(self._cache)
        self._queried_tokens = 0
        self._hit_tokens = Counter({tier.label: 0 for tier in Tier})
        self._is_open = True
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def cache(self, input_ids: Tensor) -> PrefixCache:
        """Make a cache for one call of `generate`, filled with what is known of its prompt.

        Args:
            input_ids: int64 [rows, tokens], the prompt as `generate` gets it, without padding. Of
                several rows, as much is found as all of them have.

        Raises:
            ValueError: `input_ids` has another shape or type, or the store is closed.
        """
        self._require_open()
        if input_ids.ndim != 2 or not input_ids.numel() or input_ids.dtype != torch.int64:
            raise ValueError(
                f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; expected torch.int64 "
                "[rows, tokens] with at least one token."
            )
        prompt = input_ids.to("cpu", torch.int32)
        num_tokens = prompt.shape[1] - 1  # the last one is always computed: it is sampled from
        matches, rows = [], []
        for tokens in prompt.numpy():
            match, layers = self._contiguous.read(tokens[:num_tokens])
            num_tokens = match.num_tokens
            matches.append(match)
            rows.append(layers)
        page_size = self._cache.page_size
        hits: Counter[str] = Counter()
        for match in matches:
            hits.update(match.first(num_tokens // page_size, page_size).tokens_by_tier)
        self._hit_tokens.update(hits)
        self._queried_tokens += input_ids.numel() - len(input_ids)
        prefix: list[Layer] = []
        if num_tokens:
            for number, device in enumerate(self._devices):
                keys = torch.stack([layers[number][0][:, :num_tokens] for layers in rows])
                values = torch.stack([layers[number][1][:, :num_tokens] for layers in rows])
                prefix.append((keys.to(device), values.to(device)))
        return PrefixCache(self, prompt, prefix, hits)

    def keep(self, tokens: Tensor, layers: Sequence[Layer]) -> None:
        """Copy full pages; `PrefixCache.close` calls it.

        Args:
            tokens: int32 [rows, n], in the memory of the host.
            layers: K and V of each layer, each [rows, num_kv_heads, n, head_dim].

        Raises:
            ValueError: the store is closed.
        """
        self._require_open()
        full = tokens.shape[1] // self._cache.page_size * self._cache.page_size
        for row, token_ids in enumerate(tokens.numpy()):
            kept = self._contiguous.write(
                token_ids, [(keys[row], values[row]) for keys, values in layers]
            )
            if kept < full:
                _log.warning(
                    "%d of %d tokens are kept; raise device_bytes to keep them all.", kept, full
                )

    def stats(self) -> KVCacheStats:
        """Pages by tier and state; tokens of prompts that were looked for, and found."""
        return replace(
            self._cache.stats(),
            queried_tokens=self._queried_tokens,
            hit_tokens=self._hit_tokens.total(),
            hit_tokens_by_tier=dict(self._hit_tokens),
        )

    def close(self, timeout: float = 5.0) -> None:
        """Write what is on its way to the disk, `timeout` seconds at most, and end."""
        if self._is_open:
            self._is_open = False
            self._hook.remove()
            self._cache.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if not self._is_open:
            raise ValueError("This PrefixStore is closed; make another one.")

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Tell a cache of this store which tokens it is about to get."""
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        cache = arguments.get("past_key_values")
        if isinstance(cache, PrefixCache) and cache.store is self:
            cache.expect(arguments, training=model.training)
