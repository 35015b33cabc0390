"""Attention over pages by FlashInfer, with its plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nf_kernels.ops.cuda.aligned_rows import finish, to_read, to_write
from nf_kernels.ops.cuda.attention_plans import AttentionPlans, AttentionShape
from nf_kernels.ops.cuda.stream_states import StreamStates
from nf_kernels.ops.cuda.support import takes_attention
from nf_kernels.ops.operation_set import AttentionBatch

_LN_2 = math.log(2)


class PagedAttention:
    """Prefill and decode attention, which differ in FlashInfer's backend alone."""

    def __init__(self, flashinfer: Callable[[], Any], streams: StreamStates) -> None:
        """Keep no plans yet.

        Args:
            flashinfer: Gives the module.
            streams: Where workspaces and wrappers are kept.
        """
        self._plans = AttentionPlans(flashinfer, streams)

    def prepare(self, batches: Sequence[AttentionBatch]) -> None:
        """As `OperationSet.prepare`."""
        self._plans.prepare(batches)

    def attend(
        self,
        *,
        backend: str,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        page_table: Tensor,
        query_start: Tensor | None,
        seq_lens: Tensor,
        scale: float,
        window: int,
        out: Tensor,
        soft_cap: float,
        lse: Tensor | None,
    ) -> bool:
        """Compute `reference.prefill_attention`; False where FlashInfer does not take such heads.

        Args:
            backend: FlashInfer's, `fa2` or `auto`.
            q: This and what follows as `reference.prefill_attention`, already checked.
            k_cache: See there.
            v_cache: See there.
            page_table: See there.
            query_start: See there; None for one query of each request.
            seq_lens: See there.
            scale: See there.
            window: See there.
            out: See there.
            soft_cap: See there.
            lse: See there.

        Raises:
            ValueError: Lengths, queries and pages do not fit together.
            RuntimeError: FlashInfer is not there.
        """
        num_pages, kv_heads, page_size, head_dim = k_cache.shape
        rows, heads = q.shape[0], q.shape[1] // head_dim
        if not rows and not seq_lens.shape[0]:
            return True
        if not takes_attention(q.dtype, head_dim):
            return False
        shape = AttentionShape(
            backend=backend,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            dtype=q.dtype,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
        )
        # FlashAttention-2 writes rows without gaps.
        written = to_write(out, contiguous=True)
        with self._plans.planned(
            shape, page_table, seq_lens, query_start, num_pages=num_pages, rows=rows
        ) as wrapper:
            wrapper.run(
                to_read(q).unflatten(1, (heads, head_dim)),
                (k_cache, v_cache),
                out=written.unflatten(1, (heads, head_dim)),
                lse=lse,
                return_lse=lse is not None,
            )
        finish(out, written)
        if lse is not None:
            lse.mul_(_LN_2)  # FlashInfer's logarithm is to base 2
        return True
