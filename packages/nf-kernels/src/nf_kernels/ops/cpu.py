"""The operations that run natively on a CPU; what is not here runs in plain torch.

Arguments are those of `nf_kernels.ops.reference`. Shapes and dtypes are checked here, before the
extension is given an address; float32, bfloat16 and float16 are supported.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nf_kernels.native import native_module
from nf_kernels.ops import reference

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Bounds of the kernels' stack buffers (csrc/kernels_impl.h); beyond them plain torch takes over.
_MAX_HEAD_DIM = 512
_MAX_PAGE_SIZE = 128
_MAX_GROUP = 32


def _kernels() -> Any:
    return native_module()


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    fits = tensor.shape == shape or (
        None in shape
        and tensor.dim() == len(shape)
        and all(want in (None, have) for have, want in zip(tensor.shape, shape, strict=True))
    )
    if tensor.dtype != dtype or not fits or not tensor.is_cpu:
        expected = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
            f"expected {dtype} {expected} on cpu"
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {tensor.stride(-1)} in its last dimension; expected 1, "
            f"make it contiguous"
        )


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass a contiguous tensor")


def _dtype_code(name: str, tensor: Tensor) -> int:
    code = _DTYPES.get(tensor.dtype)
    if code is None:
        raise ValueError(
            f"{name} is {tensor.dtype}; expected torch.float32, torch.bfloat16 or torch.float16"
        )
    return code


def _check_cache(k_cache: Tensor, v_cache: Tensor, dtype: torch.dtype) -> None:
    _check("k_cache", k_cache, dtype, (None, None, None, None))
    _check("v_cache", v_cache, dtype, tuple(k_cache.shape))
    _check_contiguous("k_cache", k_cache)
    _check_contiguous("v_cache", v_cache)
    if 0 in k_cache.shape[1:]:
        raise ValueError(
            f"k_cache is {list(k_cache.shape)}; "
            f"expected [pages, KV heads, page size, head_dim], the last three at least 1"
        )


def rms_norm(*, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """As `reference.rms_norm`."""
    _check("x", x, x.dtype, (None, None))
    rows, width = x.shape
    _check("weight", weight, x.dtype, (width,))
    _check("out", out, x.dtype, (rows, width))
    _kernels().rms_norm(
        _dtype_code("x", x),
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        x.stride(0),
        out.stride(0),
        eps,
    )


def swiglu(*, gate_up: Tensor, out: Tensor) -> None:
    """As `reference.swiglu`."""
    _check("gate_up", gate_up, gate_up.dtype, (None, None))
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has rows of {gate_up.shape[1]}; expected an even number")
    _check("out", out, gate_up.dtype, (rows, width))
    _kernels().swiglu(
        _dtype_code("gate_up", gate_up),
        gate_up.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        gate_up.stride(0),
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
    _check_cache(k_cache, v_cache, qkv.dtype)
    num_pages, kv_heads, page_size, head_dim = k_cache.shape
    if head_dim % 2:
        raise ValueError(f"k_cache has heads of {head_dim}; rotation needs an even number")
    _check("qkv", qkv, qkv.dtype, (None, None))
    tokens, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    if heads < 1 or width % head_dim:
        raise ValueError(
            f"qkv has rows of {width}; expected a multiple of head_dim {head_dim}, "
            f"with more than the {2 * kv_heads} heads of K and V"
        )
    _check("out", out, qkv.dtype, (tokens, heads * head_dim))
    _check("positions", positions, torch.int64, (tokens,))
    _check("slots", slots, torch.int64, (tokens,))
    _check("cos_sin", cos_sin, torch.float32, (None, head_dim))
    _check_contiguous("cos_sin", cos_sin)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            _check(name, norm, qkv.dtype, (head_dim,))
    if head_dim > _MAX_HEAD_DIM:
        reference.rope_append(
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
    _kernels().rope_append(
        _dtype_code("qkv", qkv),
        qkv.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        cos_sin.data_ptr(),
        q_norm.data_ptr() if q_norm is not None else 0,
        k_norm.data_ptr() if k_norm is not None else 0,
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
) -> None:
    """As `reference.prefill_attention`."""
    _check_cache(k_cache, v_cache, q.dtype)
    num_pages, kv_heads, page_size, head_dim = k_cache.shape
    _check("q", q, q.dtype, (None, None))
    _check("out", out, q.dtype, tuple(q.shape))
    _check("seq_lens", seq_lens, torch.int32, (None,))
    requests = seq_lens.shape[0]
    _check("query_start", query_start, torch.int32, (requests + 1,))
    _check("page_table", page_table, torch.int32, (requests, None))
    heads = q.shape[1] // head_dim
    if heads < 1 or q.shape[1] % (kv_heads * head_dim):
        raise ValueError(
            f"q has rows of {q.shape[1]}; expected a multiple of "
            f"{kv_heads} KV heads * head_dim {head_dim}"
        )
    if window < 0:
        raise ValueError(f"window is {window}; expected 0 (all keys) or a number of keys")
    if head_dim > _MAX_HEAD_DIM or page_size > _MAX_PAGE_SIZE or heads // kv_heads > _MAX_GROUP:
        reference.prefill_attention(
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            page_table=page_table,
            query_start=query_start,
            seq_lens=seq_lens,
            scale=scale,
            window=window,
            out=out,
        )
        return
    _kernels().paged_attention(
        _dtype_code("q", q),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        page_table.data_ptr(),
        query_start.data_ptr(),
        seq_lens.data_ptr(),
        out.data_ptr(),
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
        window,
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
) -> None:
    """As `reference.decode_attention`."""
    _check("q", q, q.dtype, (None, None))
    _check("seq_lens", seq_lens, torch.int32, (q.shape[0],))
    prefill_attention(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=page_table,
        query_start=torch.arange(q.shape[0] + 1, dtype=torch.int32),
        seq_lens=seq_lens,
        scale=scale,
        window=window,
        out=out,
    )


OPERATIONS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {
        "rms_norm": rms_norm,
        "swiglu": swiglu,
        "rope_append": rope_append,
        "prefill_attention": prefill_attention,
        "decode_attention": decode_attention,
    }
)
