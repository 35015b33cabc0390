"""Every operation, native on a CPU.

Arguments are those of `nf_kernels.ops.reference`. Shapes and dtypes are checked here, before the
extension is given an address; float32, bfloat16 and float16 are supported.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nf_kernels.lanes.cpu import current_lane
from nf_kernels.native import native_module
from nf_kernels.ops import packing, reference
from nf_kernels.ops.checks import Checks
from nf_kernels.ops.kept_by_lane import kept_by_lane

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Bounds of the kernels' stack buffers (csrc/kernels_impl.h); beyond them plain torch takes over.
_MAX_HEAD_DIM = 512
_MAX_GROUP = 32


def _kernels() -> Any:
    return native_module()


_checks = Checks("cpu", tuple(_DTYPES))
_check, _check_contiguous, _check_cache = _checks.tensor, _checks.contiguous, _checks.caches


def _check_packed(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    experts: tuple[int, ...],
    out_features: int,
    in_features: int,
) -> None:
    expected = (*experts, *packing.packed_shape(out_features, in_features, dtype))
    if tensor.shape != expected and tensor.dim() == 2 + len(experts):
        raise ValueError(
            f"{name} is {list(tensor.shape)}, not packed; expected {list(expected)}, "
            f"as OperationSet.pack makes it"
        )
    _check(name, tensor, dtype, expected)
    _check_contiguous(name, tensor)


def _in_plain_torch(operation: Callable[..., None], **arguments: Any) -> None:
    """Run an operation on what the kernels do not take; it waits for a lane instead of queueing."""
    lane = current_lane()
    if lane is not None:
        lane.synchronize()
    operation(**arguments)


def _address(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None else 0


def _scratch(scratch: Tensor | None, needed: int) -> int:
    """The address of scratch of at least `needed` bytes."""
    if scratch is None:
        raise ValueError(
            f"scratch is None; expected uint8 [{needed}] or more, see OperationSet.scratch_bytes"
        )
    _check("scratch", scratch, torch.uint8, (None,))
    if scratch.shape[0] < needed:
        raise ValueError(f"scratch is uint8 [{scratch.shape[0]}]; expected [{needed}] or more")
    return scratch.data_ptr()


def _dtype_code(name: str, tensor: Tensor) -> int:
    code = _DTYPES.get(tensor.dtype)
    if code is None:
        raise ValueError(
            f"{name} is {tensor.dtype}; expected torch.float32, torch.bfloat16 or torch.float16"
        )
    return code


def rms_norm(
    *, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None
) -> None:
    """As `reference.rms_norm`."""
    _check("x", x, x.dtype, (None, None))
    rows, width = x.shape
    _check("weight", weight, x.dtype, (width,))
    _check("out", out, x.dtype, (rows, width))
    if residual is not None:
        _check("residual", residual, x.dtype, (rows, width))
    _kernels().rms_norm(
        _dtype_code("x", x),
        x.data_ptr(),
        weight.data_ptr(),
        _address(residual),
        out.data_ptr(),
        rows,
        width,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        eps,
    )


def linear(
    *,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """As `reference.linear`, with a weight that `packing.pack` has packed.

    The sum of an element has one order, whatever the number of rows; bias and residual are added in
    float32, before the one rounding, of which there is none where `out` is float32.
    """
    _check("x", x, x.dtype, (None, None))
    float_out = out.dtype == torch.float32
    _check("out", out, torch.float32 if float_out else x.dtype, (x.shape[0], None))
    rows, in_features = x.shape
    out_features = out.shape[1]
    _check_packed("weight", weight, x.dtype, (), out_features, in_features)
    if bias is not None:
        _check("bias", bias, x.dtype, (out_features,))
    if residual is not None:
        _check("residual", residual, x.dtype, (rows, out_features))
    _kernels().linear(
        _dtype_code("x", x),
        x.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        _address(residual),
        out.data_ptr(),
        rows,
        in_features,
        out_features,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        float_out,
    )


def embedding(*, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
    """As `reference.embedding`; the table may be packed, as one that is the head, too."""
    _check("token_ids", token_ids, torch.int64, (None,))
    _check("out", out, table.dtype, (token_ids.shape[0], None))
    packed = table.dim() > 2
    if packed:
        # How many rows the last block has is not known here; what fills it up is zero.
        rows = table.shape[0] * packing.BLOCK
        _check_packed("table", table, out.dtype, (), rows, out.shape[1])
    else:
        _check("table", table, out.dtype, (None, out.shape[1]))
        rows = table.shape[0]
    _gather("token_ids", table, token_ids, out, source_rows=rows, packed=packed)


def gather_rows(*, x: Tensor, index: Tensor, out: Tensor) -> None:
    """As `reference.gather_rows`."""
    _check("index", index, torch.int64, (None,))
    _check("x", x, x.dtype, (None, None))
    _check("out", out, x.dtype, (index.shape[0], x.shape[1]))
    _gather("index", x, index, out, source_rows=x.shape[0], packed=False)


def _gather(
    name: str, source: Tensor, index: Tensor, out: Tensor, *, source_rows: int, packed: bool
) -> None:
    _kernels().gather_rows(
        _dtype_code("out", out),
        source.data_ptr(),
        index.data_ptr(),
        out.data_ptr(),
        index.shape[0],
        out.shape[1],
        source_rows,
        source.stride(0),
        out.stride(0),
        packed,
        name,
    )


def moe_route(
    *, router_logits: Tensor, normalize: bool, expert_ids: Tensor, expert_weights: Tensor
) -> None:
    """As `reference.moe_route`; of equal logits the first expert."""
    _check("router_logits", router_logits, router_logits.dtype, (None, None))
    tokens, experts = router_logits.shape
    _check("expert_ids", expert_ids, torch.int64, (tokens, None))
    chosen = expert_ids.shape[1]
    _check("expert_weights", expert_weights, torch.float32, (tokens, chosen))
    _check_contiguous("expert_ids", expert_ids)
    _check_contiguous("expert_weights", expert_weights)
    if not 1 <= chosen <= experts:
        raise ValueError(
            f"expert_ids has rows of {chosen}; expected 1 to {experts}, the experts there are"
        )
    _kernels().moe_route(
        _dtype_code("router_logits", router_logits),
        router_logits.data_ptr(),
        expert_ids.data_ptr(),
        expert_weights.data_ptr(),
        tokens,
        experts,
        chosen,
        router_logits.stride(0),
        normalize,
    )


def moe_experts(
    *,
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor,
    out: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """As `reference.moe_experts`, with weights that `packing.pack` has packed, in `scratch`."""
    _check("x", x, x.dtype, (None, None))
    tokens, hidden = x.shape
    _check("expert_ids", expert_ids, torch.int64, (tokens, None))
    chosen = expert_ids.shape[1]
    _check("expert_weights", expert_weights, torch.float32, (tokens, chosen))
    _check_contiguous("expert_ids", expert_ids)
    _check_contiguous("expert_weights", expert_weights)
    _check("residual", residual, x.dtype, (tokens, hidden))
    _check("out", out, x.dtype, (tokens, hidden))
    experts = gate_up.shape[0]
    inner = _inner_size(down)
    _check_packed("gate_up", gate_up, x.dtype, (experts,), 2 * inner, hidden)
    _check_packed("down", down, x.dtype, (experts,), hidden, inner)
    needed = moe_experts_scratch_bytes(
        tokens=tokens, experts_per_token=chosen, gate_up=gate_up, down=down
    )
    _kernels().moe_experts(
        _dtype_code("x", x),
        x.data_ptr(),
        expert_ids.data_ptr(),
        expert_weights.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        residual.data_ptr(),
        out.data_ptr(),
        _scratch(scratch, needed),
        tokens,
        chosen,
        experts,
        hidden,
        inner,
        x.stride(0),
        residual.stride(0),
        out.stride(0),
        gate_up.stride(0),
        down.stride(0),
    )


def _inner_size(down: Tensor) -> int:
    """Feed-forward size of packed experts."""
    steps = down.shape[2] if down.dim() > 2 else 0
    return steps * (2 if down.dtype == torch.bfloat16 else 1)


def moe_experts_scratch_bytes(
    *, tokens: int, experts_per_token: int, gate_up: Tensor, down: Tensor
) -> int:
    """Bytes of scratch of `moe_experts` with these packed weights."""
    pair = 2 if gate_up.dtype == torch.bfloat16 else 1
    return int(
        _kernels().moe_experts_scratch_bytes(
            _dtype_code("gate_up", gate_up),
            tokens,
            experts_per_token,
            gate_up.shape[0],
            gate_up.shape[2] * pair,
            _inner_size(down),
        )
    )


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
    _check("a", a, a.dtype, (None, None))
    _check("b", b, a.dtype, tuple(a.shape))
    _check("out", out, a.dtype, tuple(a.shape))
    _check("lse_a", lse_a, torch.float32, (a.shape[0], None))
    heads = lse_a.shape[1]
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b), ("lse_out", lse_out)):
        _check(name, lse, torch.float32, (a.shape[0], heads))
        _check_contiguous(name, lse)
    if heads < 1 or a.shape[1] % heads:
        raise ValueError(
            f"a has rows of {a.shape[1]}; expected a multiple of lse_a's {heads} heads"
        )
    _kernels().merge_attention(
        _dtype_code("a", a),
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


def sample(
    *,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    out: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """As `sampling.sample`, adding up in float64, in `scratch`."""
    _check("logits", logits, torch.float32, (None, None))
    rows, vocab_size = logits.shape
    for name, values, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("uniform", uniform, torch.float32),
        ("out", out, torch.int64),
    ):
        _check(name, values, dtype, (rows,))
    if rows and not vocab_size:
        raise ValueError("logits has rows of 0; expected at least one token to choose from")
    _kernels().sample(
        logits.data_ptr(),
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        uniform.data_ptr(),
        out.data_ptr(),
        _scratch(scratch, sample_scratch_bytes(vocab_size=vocab_size)),
        rows,
        vocab_size,
        logits.stride(0),
    )


def sample_scratch_bytes(*, vocab_size: int) -> int:
    """Bytes of scratch of `sample`: some for every thread."""
    return int(_kernels().sample_scratch_bytes(vocab_size))


def swiglu(*, gate_up: Tensor, out: Tensor) -> None:
    """As `reference.swiglu`."""
    _check("gate_up", gate_up, gate_up.dtype, (None, None))
    rows, both = gate_up.shape
    if both % 2:
        raise ValueError(f"gate_up has rows of {both}; expected an even number")
    width = both // 2
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
        _in_plain_torch(
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
    _kernels().rope_append(
        _dtype_code("qkv", qkv),
        qkv.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        cos_sin.data_ptr(),
        _address(q_norm),
        _address(k_norm),
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
    _check("seq_lens", seq_lens, torch.int32, (None,))
    _check("query_start", query_start, torch.int32, (seq_lens.shape[0] + 1,))
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
    _in_plain_torch(
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
    _check("q", q, q.dtype, (None, None))
    _check("seq_lens", seq_lens, torch.int32, (q.shape[0],))
    if _has_attention(q, k_cache, v_cache):
        _attention(
            q, k_cache, v_cache, page_table, None, seq_lens, scale, window, out, soft_cap, lse
        )
        return
    _in_plain_torch(
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
    _check_cache(k_cache, v_cache, q.dtype)
    _check("q", q, q.dtype, (None, None))
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
    _check("out", out, q.dtype, tuple(q.shape))
    _check("page_table", page_table, torch.int32, (requests, None))
    if window < 0:
        raise ValueError(f"window is {window}; expected 0 (all keys) or a number of keys")
    if not 0 <= soft_cap < math.inf:
        raise ValueError(f"soft_cap is {soft_cap}; expected 0 (none) or a positive number")
    if lse is not None:
        _check("lse", lse, torch.float32, (q.shape[0], heads))
        _check_contiguous("lse", lse)
    _kernels().paged_attention(
        _dtype_code("q", q),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        page_table.data_ptr(),
        _address(query_start),
        seq_lens.data_ptr(),
        out.data_ptr(),
        _address(lse),
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


OPERATIONS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {
        operation.__name__: kept_by_lane(operation, current_lane)
        for operation in (
            embedding,
            gather_rows,
            rms_norm,
            linear,
            rope_append,
            prefill_attention,
            decode_attention,
            merge_attention,
            swiglu,
            moe_route,
            moe_experts,
            sample,
        )
    }
)
