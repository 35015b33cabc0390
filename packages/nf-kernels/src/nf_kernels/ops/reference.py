"""Every operation in plain torch, on any device.

Norms, RoPE and attention compute in float32, or in float64 where that is what they are given.

An operation that has a parameter `scratch` works in that memory, uint8 [bytes], in the other
implementations; `OperationSet.scratch_bytes` says how much. Plain torch allocates its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nf_kernels.ops.sampling import feed_sampled, keep_sampled, sample

__all__ = [
    "decode_attention",
    "embedding",
    "feed_sampled",
    "gather_rows",
    "keep_sampled",
    "linear",
    "merge_attention",
    "moe_experts",
    "moe_route",
    "prefill_attention",
    "rms_norm",
    "rope_append",
    "sample",
    "swiglu",
]


def embedding(*, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
    """Look up rows of the embedding table.

    Args:
        token_ids: int64 [T].
        table: [vocabulary, D].
        out: [T, D], dtype of `table`.
    """
    torch.index_select(table, 0, token_ids, out=out)


def gather_rows(*, x: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy the rows `index` (int64 [S]) of `x` [T, D] to `out` [S, D]."""
    torch.index_select(x, 0, index, out=out)


def rms_norm(
    *, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None
) -> None:
    """Root-mean-square norm of each row: x / sqrt(mean(x²) + eps) * weight.

    Args:
        x: [T, D].
        weight: [D].
        eps: Added to the mean square.
        out: [T, D].
        residual: [T, D] or None. x is added to it first, and the sum is what is normalized.
    """
    if residual is not None:
        residual.add_(x)
        x = residual
    out.copy_(_rms_normalize(x, weight, eps))


def _wide(x: Tensor) -> Tensor:
    """Make it float32, unless it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _rms_normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)


def linear(
    *,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Matrix product x @ weightᵀ, plus a bias, plus a residual.

    Args:
        x: [T, K].
        weight: [N, K].
        out: [T, N], as x or float32; may be `residual` itself.
        bias: [N], or None.
        residual: [T, N], or None.
    """
    if out.dtype != x.dtype:
        rounded = torch.empty_like(out, dtype=x.dtype)
        linear(x=x, weight=weight, out=rounded, bias=bias, residual=residual)
        out.copy_(rounded)
        return
    if residual is not None:
        torch.addmm(residual, x, weight.t(), out=out)
        if bias is not None:
            out.add_(bias)
    elif bias is not None:
        torch.addmm(bias, x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out=out)


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
    """Split qkv, normalize Q and K heads if asked, rotate them, and append K and V to their pages.

    The rotation pairs element j with j + d/2 (the Hugging Face layout).

    Args:
        qkv: [T, (H + 2G) * d], rows are Q heads, K heads, V heads.
        positions: int64 [T].
        slots: int64 [T], page * page_size + offset of each token.
        cos_sin: float32 [positions, d], d/2 cosines then d/2 sines.
        k_cache: [pages, G, page_size, d].
        v_cache: As `k_cache`.
        out: [T, H * d], the rotated queries.
        q_norm: [d], RMS-norm weight of every Q head, or None.
        k_norm: [d], of every K head, or None.
        eps: Of these norms.
    """
    _, kv_heads, page_size, head_dim = k_cache.shape
    heads = out.shape[1] // head_dim
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q = _rms_normalize(q, q_norm, eps)
    if k_norm is not None:
        k = _rms_normalize(k, k_norm, eps)
    cosine, sine = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    out.copy_(_rotate(q, cosine, sine).flatten(1))
    pages = torch.div(slots, page_size, rounding_mode="floor")
    offsets = slots % page_size
    k_cache[pages, :, offsets] = _rotate(k, cosine, sine).to(k_cache.dtype)
    v_cache[pages, :, offsets] = v


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = _wide(x).chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


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
    """Causal attention of the last tokens of some requests over all their pages.

    Args:
        q: [T, H * d], rows by request.
        k_cache: [pages, G, page_size, d], the queries' own keys included.
        v_cache: As `k_cache`.
        page_table: int32 [requests, P].
        query_start: int32 [requests + 1], rows of `q` of each request, counted from the first of
            these numbers on, which must be 0 in the CUDA set.
        seq_lens: int32 [requests], tokens in pages, the queries' own included.
        scale: Factor on the scores.
        window: Keys a query sees, itself included; 0 means all.
        out: [T, H * d].
        soft_cap: Scores become soft_cap * tanh(score / soft_cap); 0 leaves them as they are.
        lse: float32 [T, H] or None, written: the natural logarithm of the sum of the exponentials
            of the scores, by which `merge_attention` weighs the result.
    """
    _, kv_heads, page_size, head_dim = k_cache.shape
    group = q.shape[1] // (kv_heads * head_dim)
    starts = query_start.tolist()
    for request, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[request] - starts[0], starts[request + 1] - starts[0])
        pages = page_table[request, : -(-seq_len // page_size)].long()
        keys, values = (
            _wide(cache[pages].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :seq_len])
            for cache in (k_cache, v_cache)
        )
        count = rows.stop - rows.start
        queries = _wide(q[rows].view(count, kv_heads, group, head_dim))
        scores = _cap(torch.einsum("tkgd,ksd->kgts", queries * scale, keys), soft_cap)
        key_at = torch.arange(seq_len, device=q.device)
        query_at = torch.arange(seq_len - count, seq_len, device=q.device).unsqueeze(1)
        hidden = key_at > query_at
        if window:
            hidden |= key_at <= query_at - window
        scores = scores.masked_fill(hidden, -torch.inf)
        if lse is not None:
            lse[rows].copy_(scores.logsumexp(dim=-1).permute(2, 0, 1).flatten(1))
        weights = scores.softmax(dim=-1)
        mixed = torch.einsum("kgts,ksd->tkgd", weights, values)
        out[rows].copy_(mixed.reshape(count, -1))


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
    """Attention of one token per request; as `prefill_attention` with one row each."""
    _, kv_heads, page_size, head_dim = k_cache.shape
    keys, values = (
        _wide(cache[page_table.long()].transpose(1, 2).flatten(2, 3))
        for cache in (k_cache, v_cache)
    )
    queries = _wide(q.unflatten(1, (kv_heads, -1, head_dim))) * scale
    scores = _cap(queries @ keys.transpose(2, 3), soft_cap)
    key_at = torch.arange(page_table.shape[1] * page_size, device=q.device)
    hidden = key_at >= seq_lens.unsqueeze(1)
    if window:
        hidden |= key_at < seq_lens.unsqueeze(1) - window
    hidden = hidden[:, None, None, :]
    scores = scores.masked_fill(hidden, -torch.inf)
    if lse is not None:
        lse.copy_(scores.logsumexp(dim=-1).flatten(1))
    weights = scores.softmax(dim=-1)
    # Pages past the end may hold anything, NaN too, which a zero weight would not silence.
    values = values.masked_fill(hidden.transpose(2, 3), 0.0)
    out.copy_((weights @ values).flatten(1))


def _cap(scores: Tensor, soft_cap: float) -> Tensor:
    return soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores


def merge_attention(
    *,
    a: Tensor,
    lse_a: Tensor,
    b: Tensor,
    lse_b: Tensor,
    out: Tensor,
    lse_out: Tensor,
) -> None:
    """Join the attention of the same queries over two sets of keys into that over both.

    Args:
        a: [T, H * d], the attention over the first keys.
        lse_a: float32 [T, H], as `prefill_attention` writes it; minus infinity for no keys.
        b: As `a`, over the other keys.
        lse_b: As `lse_a`.
        out: [T, H * d]; may be `a` or `b` itself. Zero where neither state has keys.
        lse_out: float32 [T, H]; may be `lse_a` or `lse_b` itself.
    """
    heads = lse_a.shape[1]
    both = torch.logaddexp(lse_a, lse_b)
    empty = both == -torch.inf
    total = torch.zeros_like(_wide(a.unflatten(1, (heads, -1))))
    for state, lse in ((a, lse_a), (b, lse_b)):
        share = (lse - both).exp().masked_fill(empty, 0.0).unsqueeze(2)
        # A state without keys may hold anything, NaN too, which a zero share would not silence.
        values = _wide(state.unflatten(1, (heads, -1))).masked_fill(share == 0, 0.0)
        total += share * values
    out.copy_(total.flatten(1))
    lse_out.copy_(both)


def swiglu(*, gate_up: Tensor, out: Tensor) -> None:
    """silu(gate) * up, with `gate_up` [T, 2F] holding gate then up, `out` [T, F]."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


def moe_route(
    *, router_logits: Tensor, normalize: bool, expert_ids: Tensor, expert_weights: Tensor
) -> None:
    """Choose the experts of each token: softmax over all, the largest k, optionally normalized.

    Args:
        router_logits: [T, E].
        normalize: Scale the k weights to sum to 1.
        expert_ids: int64 [T, k], written.
        expert_weights: float32 [T, k], written.
    """
    probabilities = _wide(router_logits).softmax(dim=-1)
    weights, ids = probabilities.topk(expert_ids.shape[1], dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    expert_ids.copy_(ids)
    expert_weights.copy_(weights)


def moe_experts(
    *,
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    out: Tensor,
    residual: Tensor | None = None,
    first_expert: int | None = None,
    scratch: Tensor | None = None,
) -> None:
    """Weighted sum of each token's experts, added to the residual.

    Args:
        x: [T, D].
        expert_ids: int64 [T, k].
        expert_weights: float32 [T, k].
        gate_up: [E, 2F, D].
        down: [E, D, F].
        out: [T, D]; may be `residual` itself.
        residual: [T, D], or None, which is zero.
        first_expert: Id of the first expert of `gate_up`, where these are a part of all; choices of
            others count for nothing. None: they are all there are.
        scratch: See above.
    """
    total = _wide(torch.zeros_like(x) if residual is None else residual.clone())
    if first_expert is not None:
        expert_ids = expert_ids - first_expert
    for expert in expert_ids.unique().tolist():
        if first_expert is not None and not 0 <= expert < len(gate_up):
            continue
        rows, choice = (expert_ids == expert).nonzero(as_tuple=True)
        gate, up = (x[rows] @ gate_up[expert].t()).chunk(2, dim=-1)
        result = (F.silu(gate) * up) @ down[expert].t()
        total.index_add_(0, rows, _wide(result) * expert_weights[rows, choice].unsqueeze(1))
    out.copy_(total)
