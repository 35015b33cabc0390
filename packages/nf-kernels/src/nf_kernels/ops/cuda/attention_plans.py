"""FlashInfer's plans of attention over pages: made once for a batch, run in every layer.

FlashInfer cuts the work of a batch into pieces on the host, in `plan`, before `run` starts a
kernel. A plan depends on lengths, pages and head sizes, not on the layer, so an iteration needs
one for each set of index arrays and each window, not one for each layer. Its entry points without
a plan do not fit: `xqa` has neither a soft cap nor the logarithm of the sum, and gives each request
and KV head one block however long the request is; `BatchAttention` has a plan too, which waits for
the whole device, and no window; the rest is for later architectures.

Index arrays could be recognized by their address, but their owner may write new numbers to the
same memory. So a plan is kept only for arrays that `prepare` has announced, which must not change
until it is called again; for others it is made at each call.

A device graph launches the kernels of a plan again and again, from the memory in which the plan was
when they were captured. Its plans have memory of their own, and `prepare` writes them anew.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nf_kernels.ops.cuda.stream_states import StreamState, StreamStates, Wrapper
from nf_kernels.ops.operation_set import AttentionBatch

# What FlashInfer's split of long sequences writes between its two steps. It wants
# heads * head_dim * 4 bytes for each row of each piece: 140 MB for 64 heads of 256 on 132 SMs. In a
# device graph there are as many pieces as there can be, and where that is too much it refuses.
WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a plan is made for, besides the index arrays.

    Attributes:
        backend: FlashInfer's, `fa2` or `auto`.
        heads: Query heads.
        kv_heads: Heads of K and V.
        head_dim: Elements of a head.
        page_size: Tokens of a page.
        dtype: Of queries and cache.
        scale: Factor on the scores.
        window: Keys a query sees, itself included; 0 means all.
        soft_cap: As `reference.prefill_attention`.
    """

    backend: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    scale: float
    window: int
    soft_cap: float


_Key = tuple[tuple[int, ...], ...]


def _key(page_table: Tensor, seq_lens: Tensor, query_start: Tensor | None) -> _Key:
    return tuple(
        (tensor.data_ptr(), *tensor.shape, *tensor.stride())
        for tensor in (page_table, seq_lens, query_start)
        if tensor is not None
    )


class AttentionPlans:
    """Plans for announced index arrays, and for others one at a time.

    Safe for several threads, as long as each runs on a stream of its own.
    """

    def __init__(self, flashinfer: Callable[[], Any], streams: StreamStates) -> None:
        """Keep no plans yet.

        Args:
            flashinfer: Gives the module.
            streams: Where workspaces and wrappers are kept.
        """
        self._flashinfer = flashinfer
        self._streams = streams
        self._lock = threading.Lock()
        self._announced: dict[_Key, AttentionBatch] = {}
        self._planned: dict[tuple[_Key, AttentionShape, int], tuple[StreamState, Wrapper]] = {}
        self._in_graphs: weakref.WeakKeyDictionary[
            object, dict[tuple[_Key, AttentionShape], Wrapper]
        ] = weakref.WeakKeyDictionary()

    def prepare(self, batches: Sequence[AttentionBatch]) -> None:
        """As `OperationSet.prepare`."""
        with self._lock:
            for (_, shape, _), (state, wrapper) in self._planned.items():
                state.idle.setdefault(shape.backend, []).append(wrapper)
            self._planned.clear()
            # The batches are kept, so that nothing else can get their addresses.
            self._announced = {_key(b.page_table, b.seq_lens, b.query_start): b for b in batches}
            anew = [
                (wrapper, shape, batch)
                for key, batch in self._announced.items()
                if batch.device_graph is not None
                for (of, shape), wrapper in self._in_graphs.get(batch.device_graph, {}).items()
                if of == key
            ]
        for wrapper, shape, batch in anew:
            self._plan(wrapper, shape, batch, num_pages=wrapper.num_pages, rows=wrapper.rows)

    @contextmanager
    def planned(
        self,
        shape: AttentionShape,
        page_table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor | None,
        *,
        num_pages: int,
        rows: int,
    ) -> Iterator[Any]:
        """A wrapper that is ready to run.

        Args:
            shape: What to plan for.
            page_table: int32 [R, P], R at least 1.
            seq_lens: int32 [R].
            query_start: int32 [R + 1], or None for one query of each request.
            num_pages: Pages of the cache.
            rows: Queries.

        Raises:
            ValueError: Lengths, queries and pages do not fit together.
        """
        key = _key(page_table, seq_lens, query_start)
        state = self._streams.current(page_table.device)
        with self._lock:
            batch = self._announced.get(key)
        if batch is not None and batch.device_graph is not None:
            yield self._of_graph(batch, (key, shape), state, num_pages, rows).flashinfer
            return
        with self._lock:
            found = self._planned.get((key, shape, id(state)))
            if found is not None:
                wrapper = found[1]
            else:
                wrapper = self._idle(state, shape.backend, page_table.device)
        kept = found is not None
        try:
            if found is not None:
                _check_rows(wrapper.rows, rows)
                _check_page(wrapper.last_page, num_pages)
            else:
                arrays = batch or AttentionBatch(page_table, seq_lens, query_start)
                self._plan(wrapper, shape, arrays, num_pages=num_pages, rows=rows)
                with self._lock:
                    # Another thread may have announced others since.
                    kept = batch is not None and self._announced.get(key) is batch
                    if kept:
                        self._planned[key, shape, id(state)] = state, wrapper
            yield wrapper.flashinfer
        finally:
            if not kept:
                with self._lock:
                    state.idle.setdefault(shape.backend, []).append(wrapper)

    def _of_graph(
        self,
        batch: AttentionBatch,
        key: tuple[_Key, AttentionShape],
        state: StreamState,
        num_pages: int,
        rows: int,
    ) -> Wrapper:
        """The wrapper of a device graph, planned by the call that comes before the captured one.

        Its workspace is that of the stream of that call, whatever stream it is called on later.
        """
        with self._lock:
            kept = self._in_graphs.setdefault(batch.device_graph, {})
            wrapper = kept.get(key)
        if wrapper is None:
            shape = key[1]
            wrapper = self._for_graph(state, shape.backend, batch)
            self._plan(wrapper, shape, batch, num_pages=num_pages, rows=rows)
            with self._lock:
                kept[key] = wrapper
        return wrapper

    def _for_graph(self, state: StreamState, backend: str, batch: AttentionBatch) -> Wrapper:
        """A new wrapper whose plans are always in the same memory."""
        requests, entries = batch.page_table.shape
        device = batch.page_table.device
        sizes = (requests + 1, requests + 1, requests * entries, requests)
        query_start, indptr, indices, last = (
            torch.empty(size, dtype=torch.int32, device=device) for size in sizes
        )
        return Wrapper(
            self._flashinfer().BatchPrefillWithPagedKVCacheWrapper(
                state.buffer("attention", WORKSPACE_BYTES, device),
                kv_layout="HND",
                backend=backend,
                use_cuda_graph=True,
                qo_indptr_buf=query_start,
                paged_kv_indptr_buf=indptr,
                paged_kv_indices_buf=indices,
                paged_kv_last_page_len_buf=last,
            ),
            in_graph=True,
        )

    def _idle(self, state: StreamState, backend: str, device: torch.device) -> Wrapper:
        """A wrapper whose host memory the device has done reading; a new one rather than wait."""
        idle = state.idle.setdefault(backend, [])
        for i, wrapper in enumerate(idle):
            if wrapper.staged is None or wrapper.staged.query():
                return idle.pop(i)
        workspace = state.buffer("attention", WORKSPACE_BYTES, device)
        return Wrapper(
            self._flashinfer().BatchPrefillWithPagedKVCacheWrapper(
                workspace, kv_layout="HND", backend=backend
            )
        )

    def _plan(
        self,
        wrapper: Wrapper,
        shape: AttentionShape,
        batch: AttentionBatch,
        *,
        num_pages: int,
        rows: int,
    ) -> None:
        seq_lens, query_start = batch.on_host()
        _check_lengths(seq_lens, query_start, batch.page_table.shape[1] * shape.page_size, rows)
        pages = (seq_lens + shape.page_size - 1) // shape.page_size
        indptr = torch.zeros(len(pages) + 1, dtype=torch.int32)
        torch.cumsum(pages, dim=0, out=indptr[1:])
        # Entries of the table past the end of a request may hold anything and are left out.
        indices, last_page = _used_entries(batch, pages, num_pages)
        wrapper.rows, wrapper.last_page, wrapper.num_pages = rows, last_page, num_pages
        if wrapper.in_graph:
            if batch.page_table.is_cuda:
                # FlashInfer's copy from the host would hold it up until the device is idle.
                indices = _to_device(indices, batch.page_table.device)
            if wrapper.staged is not None:
                wrapper.staged.synchronize()
        try:
            wrapper.flashinfer.plan(
                query_start,
                indptr,
                indices,
                seq_lens - (pages - 1) * shape.page_size,
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                shape.page_size,
                causal=True,
                sm_scale=shape.scale,
                window_left=shape.window - 1 if shape.window else -1,
                logits_soft_cap=shape.soft_cap,
                q_data_type=shape.dtype,
                kv_data_type=shape.dtype,
                max_token_per_sequence=int(query_start.diff().max()),
            )
        finally:  # a plan that fails may have staged something, too
            if batch.page_table.is_cuda:
                staged = torch.cuda.Event()
                staged.record()
                wrapper.staged = staged


def _check_lengths(seq_lens: Tensor, query_start: Tensor, most: int, rows: int) -> None:
    _check_rows(int(query_start[-1]), rows, first=int(query_start[0]))
    counts = query_start.diff()
    wrong = ((counts < 1) | (seq_lens < counts) | (seq_lens > most)).nonzero()
    if len(wrong):
        request = int(wrong[0])
        raise ValueError(
            f"request {request} has {int(counts[request])} queries by query_start and "
            f"{int(seq_lens[request])} tokens by seq_lens; expected at least 1 query, no more "
            f"queries than tokens, and at most {most} tokens, the page_table's width"
        )


def _check_rows(last: int, rows: int, *, first: int = 0) -> None:
    if first != 0 or last != rows:
        raise ValueError(
            f"query_start runs from {first} to {last}; expected 0 to {rows}, the rows of q"
        )


def _check_page(page: int, num_pages: int) -> None:
    if page >= num_pages:
        raise ValueError(f"page_table has {page} in use; expected 0 to {num_pages - 1}")


def _to_device(entries: Tensor, device: torch.device) -> Tensor:
    """A copy in the order of the device's work, for which the host does not wait."""
    if entries.device == device:
        return entries
    return entries.pin_memory().to(device, non_blocking=True)


def _used_entries(batch: AttentionBatch, pages: Tensor, num_pages: int) -> tuple[Tensor, int]:
    """The table's entries that are in use, int32, request by request, and the highest; or -1."""
    if batch.host_page_table is None:
        # On the device, where the table is: its entries are not seen here and not checked.
        table = batch.page_table
        used = torch.arange(table.shape[1]) < pages.unsqueeze(1)
        where = used.flatten().nonzero().squeeze(1).to(table.device, non_blocking=True)
        return table.reshape(-1).index_select(0, where), -1
    table = batch.host_page_table[:, : int(pages.max())]
    entries = table[torch.arange(table.shape[1]) < pages.unsqueeze(1)]
    lowest, highest = (int(end) for end in entries.aminmax())
    if lowest < 0:
        raise ValueError(f"page_table has {lowest} in use; expected 0 to {num_pages - 1}")
    _check_page(highest, num_pages)
    return entries, highest
