"""Attention over paged keys and values, and what writes and merges them."""

import math

import torch
from torch import Tensor

from nf_kernels.ops import reference
from nf_kernels.ops.cpu.arguments import (
    address,
    check,
    check_caches,
    check_contiguous,
    dtype_code,
    in_plain_torch,
    kernels,
)

# Bounds of the kernels' stack buffers (csrc/attention_impl.h, csrc/math_impl.h); beyond them plain
# torch takes over.
_MAX_HEAD_DIM = 512
_MAX_GROUP = 32


def merge_attention(
    *,
    a: Tensor,
    lse_a: Tensor,
    b: Tensor,
    lse_b: Tensor,
    out: Tensor,
    lse_out: Tensor,
) -> None:
    """As `reference.merge_attention`."""
    check("a", a, a.dtype, (None, None))
    check("b", b, a.dtype, tuple(a.shape))
    check("out", out, a.dtype, tuple(a.shape))
    check("lse_a", lse_a, torch.float32, (a.shape[0], None))
    heads = lse_a.shape[1]
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b), ("lse_out", lse_out)):
        check(name, lse, torch.float32, (a.shape[0], heads))
        check_contiguous(name, lse)
    if heads < 1 or a.shape[1] % heads:
        raise ValueError(
            f"a has rows of {a.shape[1]}; expected a multiple of lse_a's {heads} heads"
        )
    kernels().merge_attention(
        dtype_code("a", a),
        a.data_ptr(),
        b.data_ptr(),
        lse_a.data_ptr(),
        lse_b.data_ptr(),
        out.data_ptr(),
        lse_out.data_ptr(),
        a.shape[0],
        heads,
        a.shape[1] // heads,
        a.stride(0),
        b.stride(0),
        out.stride(0),
    )


def rope_append(
    *,
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """As `reference.rope_append`."""
    check_caches(k_cache, v_cache, qkv.dtype)
    num_pages, kv_heads, page_size, head_dim = k_cache.shape
    if head_dim % 2:
        raise ValueError(f"k_cache has heads of {head_dim}; rotation needs an even number")
    check("qkv", qkv, qkv.dtype, (None, None))
    tokens, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    if heads < 1 or width % head_dim:
        raise ValueError(
            f"qkv has rows of {width}; expected a multiple of head_dim {head_dim}, "
            f"with more than the {2 * kv_heads} heads of K and V"
        )
    check("out", out, qkv.dtype, (tokens, heads * head_dim))
    check("positions", positions, torch.int64, (tokens,))
    check("slots", slots, torch.int64, (tokens,))
    check("cos_sin", cos_sin, torch.float32, (None, head_dim))
    check_contiguous("cos_sin", cos_sin)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check(name, norm, qkv.dtype, (head_dim,))
    if head_dim > _MAX_HEAD_DIM:
        in_plain_torch(
            reference.rope_append,
            qkv=qkv,
            positions=positions,
            slots=slots,
            cos_sin=cos_sin,
            k_cache=k_cache,
            v_cache=v_cache,
            out=out,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
        )
        return
    kernels().rope_append(
        dtype_code("qkv", qkv),
        qkv.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        cos_sin.data_ptr(),
        address(q_norm),
        address(k_norm),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        tokens,
        cos_sin.shape[0],
        num_pages,
        heads,
        kv_heads,
        head_dim,
        page_size,
        qkv.stride(0),
        out.stride(0),
        eps,
    )


def prefill_attention(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int,
    out: Tensor,
    soft_cap: float = 0.0,
    lse: Tensor | None = None,
) -> None:
    """As `reference.prefill_attention`."""
    check("seq_lens", seq_lens, torch.int32, (None,))
    check("query_start", query_start, torch.int32, (seq_lens.shape[0] + 1,))
    if _has_attention(q, k_cache, v_cache):
        _attention(
            q,
            k_cache,
            v_cache,
            page_table,
            query_start,
            seq_lens,
            scale,
            window,
            out,
            soft_cap,
            lse,
        )
        return
    in_plain_torch(
        reference.prefill_attention,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=page_table,
        query_start=query_start,
        seq_lens=seq_lens,
        scale=scale,
        window=window,
        out=out,
        soft_cap=soft_cap,
        lse=lse,
    )


def decode_attention(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int,
    out: Tensor,
    soft_cap: float = 0.0,
    lse: Tensor | None = None,
) -> None:
    """As `reference.decode_attention`."""
    check("q", q, q.dtype, (None, None))
    check("seq_lens", seq_lens, torch.int32, (q.shape[0],))
    if _has_attention(q, k_cache, v_cache):
        _attention(
            q, k_cache, v_cache, page_table, None, seq_lens, scale, window, out, soft_cap, lse
        )
        return
    in_plain_torch(
        reference.decode_attention,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=page_table,
        seq_lens=seq_lens,
        scale=scale,
        window=window,
        out=out,
        soft_cap=soft_cap,
        lse=lse,
    )


def _has_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Check the cache; tell whether the native kernel takes such heads."""
    check_caches(k_cache, v_cache, q.dtype)
    check("q", q, q.dtype, (None, None))
    _, kv_heads, _, head_dim = k_cache.shape
    if not q.shape[1] or q.shape[1] % (kv_heads * head_dim):
        raise ValueError(
            f"q has rows of {q.shape[1]}; expected a multiple of "
            f"{kv_heads} KV heads * head_dim {head_dim}"
        )
    group = q.shape[1] // (kv_heads * head_dim)
    return head_dim <= _MAX_HEAD_DIM and head_dim % 2 == 0 and group <= _MAX_GROUP


def _attention(
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
) -> None:
    """Attention of any number of queries of each request, or of one where `query_start` is None."""
    num_pages, kv_heads, page_size, head_dim = k_cache.shape
    requests, heads = seq_lens.shape[0], q.shape[1] // head_dim
    check("out", out, q.dtype, tuple(q.shape))
    check("page_table", page_table, torch.int32, (requests, None))
    if window < 0:
        raise ValueError(f"window is {window}; expected 0 (all keys) or a number of keys")
    if not 0 <= soft_cap < math.inf:
        raise ValueError(f"soft_cap is {soft_cap}; expected 0 (none) or a positive number")
    if lse is not None:
        check("lse", lse, torch.float32, (q.shape[0], heads))
        check_contiguous("lse", lse)
    kernels().paged_attention(
        dtype_code("q", q),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        page_table.data_ptr(),
        address(query_start),
        seq_lens.data_ptr(),
        out.data_ptr(),
        address(lse),
        requests,
        q.shape[0],
        num_pages,
        page_table.shape[1],
        heads,
        kv_heads,
        head_dim,
        page_size,
        page_table.stride(0),
        q.stride(0),
        out.stride(0),
        scale,
        soft_cap,
        window,
    )
