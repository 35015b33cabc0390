"""FlashInfer's functions that CUDA operations call, in torch on the CPU.

They refuse what the real ones refuse, or would read and write wrongly.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from nf_kernels.ops import REFERENCE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def need(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"FlashInfer would fail: {what}")


def need_rows(*tensors: torch.Tensor, contiguous: bool = False) -> None:
    for tensor in tensors:
        need(tensor.dtype in (BF16, FP16), f"dtype {tensor.dtype}")
        need(tensor.stride(-1) == 1, "elements apart")
        need(tensor.data_ptr() % 16 == 0, "address")
        need(all(s * 2 % 16 == 0 for s in tensor.stride()[:-1]), f"strides {tensor.stride()}")
        need(tensor.is_contiguous() or not contiguous, "gaps between rows")


class Wrapper:
    """`BatchPrefillWithPagedKVCacheWrapper`, in torch."""

    plans = 0

    def __init__(
        self, workspace, kv_layout, backend, use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None,
    ):  # fmt: skip
        need(workspace.dtype == torch.uint8, "workspace")
        need(kv_layout == "HND", "layout")
        self.backend = backend
        self.fixed = None
        if use_cuda_graph:
            self.fixed = (
                qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf,
                paged_kv_last_page_len_buf,
            )  # fmt: skip
            need(len(qo_indptr_buf) == len(paged_kv_indptr_buf), "paged_kv_indptr_buf")
            need(len(qo_indptr_buf) == len(paged_kv_last_page_len_buf) + 1, "last_page_len_buf")

    def plan(
        self, qo_indptr, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, *,
        causal, sm_scale, window_left, logits_soft_cap, q_data_type, kv_data_type,
        max_token_per_sequence,
    ):  # fmt: skip
        Wrapper.plans += 1
        for tensor in (qo_indptr, indptr, indices, last_page_len):
            need(tensor.dtype == torch.int32 and tensor.is_contiguous(), "index array")
        need(head_dim in (64, 128, 256), f"head_dim {head_dim}")
        need(len(indices) == indptr[-1], "indices")
        need(max_token_per_sequence == max(qo_indptr.diff()), "max_token_per_sequence")
        need(bool((last_page_len >= 1).all() and (last_page_len <= page_size).all()), "last page")
        arrays = [array.clone() for array in (qo_indptr, indptr, indices, last_page_len)]
        if self.fixed is not None:
            need(len(qo_indptr) == len(self.fixed[0]), "the batch size should be fixed")
            need(len(indices) <= len(self.fixed[2]), "paged_kv_indices exceeds the buffer")
            for array, place in zip(arrays, self.fixed, strict=True):
                place[: len(array)] = array
            arrays = self.fixed
        self.planned = (
            *arrays,
            (heads, kv_heads, head_dim, page_size), causal, sm_scale, window_left, logits_soft_cap,
            (q_data_type, kv_data_type),
        )  # fmt: skip

    def run(self, q, caches, *, out, lse, return_lse):
        starts, indptr, indices, last, sizes, causal, scale, window_left, cap, dtypes = self.planned
        need((q.dtype, caches[0].dtype) == dtypes, "dtypes")
        heads, kv_heads, head_dim, page_size = sizes
        need(q.shape[1:] == (heads, head_dim) and len(q) == starts[-1], "shape of q")
        need_rows(q)
        need_rows(out, contiguous=self.backend == "fa2")
        need(return_lse == (lse is not None), "lse")
        for request in range(len(last)):
            pages = indices[indptr[request] : indptr[request + 1]].long()
            length = (len(pages) - 1) * page_size + int(last[request])
            keys, values = (
                cache[pages].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :length].float()
                for cache in caches
            )
            rows = slice(int(starts[request]), int(starts[request + 1]))
            queries = q[rows].float().unflatten(1, (kv_heads, -1))
            scores = torch.einsum("tkgd,ksd->kgts", queries, keys) * scale
            scores = cap * torch.tanh(scores / cap) if cap > 0 else scores
            count = rows.stop - rows.start
            distance = torch.arange(length - count, length)[:, None] - torch.arange(length)
            hidden = (distance < 0) & causal
            if window_left >= 0:
                hidden |= distance > window_left
            scores = scores.masked_fill(hidden, -torch.inf)
            mixed = torch.einsum("kgts,ksd->tkgd", scores.softmax(dim=-1), values)
            out[rows] = mixed.flatten(1, 2).to(out.dtype)
            if lse is not None:
                lse[rows] = scores.logsumexp(-1).permute(2, 0, 1).flatten(1) / math.log(2)


def rmsnorm(x, weight, eps, *, out):
    need_rows(x, weight, out)
    flat = x.reshape(-1, x.shape[-1])
    result = torch.empty(flat.shape)
    REFERENCE["rms_norm"](x=flat, weight=weight, eps=eps, out=result)
    out.copy_(result.view(x.shape))


def fused_add_rmsnorm(x, residual, weight, eps):
    need_rows(x, residual, weight)
    total = x.float() + residual.float()
    residual.copy_(total)
    REFERENCE["rms_norm"](x=total, weight=weight, eps=eps, out=x)


def silu_and_mul(source, *, out):
    need_rows(source, out, contiguous=True)
    REFERENCE["swiglu"](gate_up=source, out=out)


def apply_rope_with_cos_sin_cache_inplace(positions, query, key, head_size, cos_sin_cache):
    need(cos_sin_cache.dtype == FP32 and cos_sin_cache.is_contiguous(), "cos_sin_cache")
    need(positions.is_contiguous(), "positions")
    need_rows(query, key)
    cosine, sine = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    for part in (query, key):
        first, second = part.view(len(part), -1, head_size).float().chunk(2, dim=-1)
        turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
        part.copy_(turned.flatten(1))


def append_paged_kv_cache(
    key, value, batch_indices, positions, caches, indices, indptr, last_page_len, *, kv_layout
):
    for tensor in (batch_indices, positions, indices, indptr, last_page_len):
        need(tensor.dtype == torch.int32 and tensor.is_contiguous(), "index array")
    need(len(indptr) == len(last_page_len) + 1, "indptr")
    need(kv_layout == "HND", "layout")
    need_rows(key, value)
    page_size = caches[0].shape[2]
    need(bool((last_page_len >= 1).all() and (last_page_len <= page_size).all()), "last page")
    for token, position in enumerate(positions.tolist()):
        entry = int(indptr[batch_indices[token]]) + position // page_size
        for cache, rows in zip(caches, (key, value), strict=True):
            cache[int(indices[entry]), :, position % page_size] = rows[token]


FLASHINFER = SimpleNamespace(
    norm=SimpleNamespace(rmsnorm=rmsnorm, fused_add_rmsnorm=fused_add_rmsnorm),
    activation=SimpleNamespace(silu_and_mul=silu_and_mul),
    rope=SimpleNamespace(
        apply_rope_with_cos_sin_cache_inplace=apply_rope_with_cos_sin_cache_inplace
    ),
    page=SimpleNamespace(append_paged_kv_cache=append_paged_kv_cache),
    BatchPrefillWithPagedKVCacheWrapper=Wrapper,
)
