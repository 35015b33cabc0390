"""Every operation on a CUDA device: FlashInfer, cuBLAS through torch, and our CUTLASS kernels.

Not yet run on a device; docs/gpu-status.md says what is. Arguments are those of
`nf_kernels.ops.reference`. Dtypes, shapes and layouts are checked before anything is launched;
lengths, and page tables that the host has, when attention is planned (`attention_plans`). Other
indices are on the device and not looked at: a wrong one is an error of the device.

What computes an operation follows from its shape and dtype alone, so that views of the same rows
are computed the same. Rows that do not begin at a multiple of 16 bytes are copied to such first.

| operation | computed by | where | elsewhere |
| --- | --- | --- | --- |
| `rms_norm` | FlashInfer | 16 bits, rows of a multiple of 8 | plain torch |
| `swiglu` | FlashInfer | 16 bits, F a multiple of 8 | plain torch |
| `rope_append` | FlashInfer | 16 bits, head_dim 64, 128, 256, 512; see below | plain torch |
| `prefill_attention` | FlashInfer | 16 bits, head_dim 64, 128 or 256 | plain torch |
| `decode_attention` | FlashInfer | 16 bits, head_dim 64, 128 or 256 | plain torch |
| `linear` | cuBLAS | always | |
| `linear` on a capped lane | CUTLASS | 16 bits, `out` too; K, N multiples of 8; built | cuBLAS |
| `moe_experts` | torch, grouped product | bfloat16, D and F multiples of 8 | plain torch |
| the others | plain torch | always | |

FlashInfer's append wants the KV heads of a token in one block: head_dim / 8 threads, and from 256
on 32, for each head, at most 1024 together.

FlashInfer also has what these do, differently: its `merge_state` takes logarithms to base 2, gives
NaN where neither state has keys, and has no `out=`; its samplers draw their own random numbers,
while `sample` inverts the distribution at a number it is given, on which seeds rest.

*Batch invariance.* What computes each row, or element, on its own with a fixed order is invariant.
Not so: products, since cuBLAS chooses a kernel by the number of rows; attention, since FlashInfer
cuts long requests by how full the batch leaves the device. (A fixed piece makes its decode
invariant; in prefill the height of its tiles, and with it the order of its sums, follows from the
mean number of queries.) Nor `sample`: the order of torch's running sums follows from the number of
rows.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nf_kernels.cuda.library import CudaLibrary, load
from nf_kernels.lanes.cuda import current_lane
from nf_kernels.ops import reference
from nf_kernels.ops.attention_plans import AttentionPlans, AttentionShape, StreamStates
from nf_kernels.ops.checks import Checks
from nf_kernels.ops.operation_set import OPERATION_NAMES, AttentionBatch

INVARIANT = frozenset(
    {
        "embedding",
        "gather_rows",
        "rms_norm",
        "rope_append",
        "merge_attention",
        "swiglu",
        "moe_route",
    }
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes; FlashInfer and CUTLASS read and write so many at a time
_MAX_THREADS = 1024  # of a block
_LN_2 = math.log(2)


def flashinfer() -> Any:
    """The module.

    Raises:
        RuntimeError: It is not installed, or does not load.
    """
    module, reason = _find_flashinfer()
    if module is None:
        raise RuntimeError(f"CUDA operations need FlashInfer: {reason}")
    return module


@functools.cache
def _find_flashinfer() -> tuple[Any, str]:
    try:
        return importlib.import_module("flashinfer"), ""
    except ModuleNotFoundError as error:
        return None, f"{error}; install it with: pip install 'nf-kernels[cuda]'"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"it does not load: {error}"


def missing(device: torch.device) -> str:
    """Why the CUDA operations cannot be used on a device; empty where they can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return _find_flashinfer()[1]


def takes_rows(dtype: torch.dtype, *widths: int) -> bool:
    """Whether FlashInfer takes rows of so many elements."""
    return dtype.itemsize == 2 and all(width * 2 % _ALIGNMENT == 0 for width in widths)


def takes_rope(dtype: torch.dtype, kv_heads: int, head_dim: int) -> bool:
    """Whether FlashInfer rotates and appends such heads."""
    threads = min(head_dim // 8, 32) * kv_heads
    return takes_rows(dtype) and head_dim in (64, 128, 256, 512) and threads <= _MAX_THREADS


def takes_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashInfer attends over such heads."""
    return takes_rows(dtype) and head_dim in (64, 128, 256)


def takes_grouped(dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch's grouped product takes rows of so many elements."""
    return dtype == torch.bfloat16 and takes_rows(dtype, *widths)


def _is_aligned(rows: Tensor) -> bool:
    stride = rows.stride(0) * rows.element_size() if rows.shape[0] > 1 else 0
    return rows.data_ptr() % _ALIGNMENT == 0 and stride % _ALIGNMENT == 0


def _read(rows: Tensor) -> Tensor:
    """The rows [T, W], or an aligned copy of them."""
    return rows if _is_aligned(rows) else rows.clone(memory_format=torch.contiguous_format)


def _written(rows: Tensor, *, contiguous: bool = False) -> Tensor:
    """Where to write rows [T, W]: they themselves, or aligned memory to copy from."""
    if _is_aligned(rows) and (rows.is_contiguous() or not contiguous):
        return rows
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _finish(rows: Tensor, written: Tensor) -> None:
    if written is not rows:
        rows.copy_(written)


class CudaOperations:
    """The operations, and the memory they keep for each stream."""

    def __init__(
        self,
        *,
        library: Callable[[], Any] = flashinfer,
        cutlass: Callable[[torch.device], CudaLibrary | None] | None = None,
        device_type: str = "cuda",
    ) -> None:
        """Load nothing yet.

        Args:
            library: Gives the FlashInfer module.
            cutlass: Gives the library of CUTLASS kernels for a device, or None; by default the
                one that `python -m nf_kernels.cuda.build` builds, for Hopper.
            device_type: Where tensors must be.
        """
        self._library = library
        self._cutlass = cutlass or _built_library
        self._check = Checks(device_type, _DTYPES)
        self._streams = StreamStates()
        self._plans = AttentionPlans(library, self._streams)
        self._whole_caches: dict[tuple[torch.device, int], tuple[Tensor, ...]] = {}

    def prepare(self, batches: Sequence[AttentionBatch]) -> None:
        """As `OperationSet.prepare`."""
        self._plans.prepare(batches)

    def embedding(self, *, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
        """As `reference.embedding`."""
        self._check.tensor("token_ids", token_ids, torch.int64, (None,))
        self._check.first("table", table, (None, None))
        self._check.tensor("out", out, table.dtype, (token_ids.shape[0], table.shape[1]))
        reference.embedding(token_ids=token_ids, table=table, out=out)

    def gather_rows(self, *, x: Tensor, index: Tensor, out: Tensor) -> None:
        """As `reference.gather_rows`."""
        self._check.tensor("index", index, torch.int64, (None,))
        self._check.first("x", x, (None, None))
        self._check.tensor("out", out, x.dtype, (index.shape[0], x.shape[1]))
        reference.gather_rows(x=x, index=index, out=out)

    def rms_norm(
        self,
        *,
        x: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        residual: Tensor | None = None,
    ) -> None:
        """As `reference.rms_norm`.

        Where `out` is `x`, sum and norm are one kernel, which normalizes the sum before it is
        rounded to the dtype.
        """
        self._check.first("x", x, (None, None))
        rows, width = x.shape
        self._check.tensor("weight", weight, x.dtype, (width,))
        self._check.tensor("out", out, x.dtype, (rows, width))
        if residual is not None:
            self._check.tensor("residual", residual, x.dtype, (rows, width))
        if not rows:
            return
        if not takes_rows(x.dtype, width):
            reference.rms_norm(x=x, weight=weight, eps=eps, out=out, residual=residual)
            return
        norm = self._library().norm
        weight = _read(weight.unsqueeze(0)).squeeze(0)
        if residual is not None:
            in_place = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
            if in_place and _is_aligned(x) and _is_aligned(residual):
                norm.fused_add_rmsnorm(x, residual, weight, eps)
                return
            residual.add_(x)
            x = residual
        written = _written(out)
        norm.rmsnorm(_read(x), weight, eps, out=written)
        _finish(out, written)

    def linear(
        self,
        *,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """As `reference.linear`; on a capped lane by a kernel that keeps to its SMs."""
        self._check.first("x", x, (None, None))
        rows, in_features = x.shape
        self._check.tensor("weight", weight, x.dtype, (None, in_features))
        out_features = weight.shape[0]
        out_dtype = torch.float32 if out.dtype == torch.float32 else x.dtype
        self._check.tensor("out", out, out_dtype, (rows, out_features))
        if bias is not None:
            self._check.tensor("bias", bias, x.dtype, (out_features,))
        if residual is not None:
            self._check.tensor("residual", residual, x.dtype, (rows, out_features))
        lane = current_lane()
        operands = [t for t in (x, weight, out, residual) if t is not None]
        library = self._cutlass(x.device) if lane is not None and lane.sm_cap else None
        if (
            lane is None
            or library is None
            or not rows
            or out.dtype != x.dtype
            or not takes_rows(x.dtype, in_features, out_features)
            or not all(map(_is_aligned, operands))
            or not (bias is None or bias.data_ptr() % _ALIGNMENT == 0)
        ):
            reference.linear(x=x, weight=weight, out=out, bias=bias, residual=residual)
            return
        tile = library.best_tile(rows, out_features, in_features, lane.sm_cap)
        size = library.workspace_bytes(
            m=rows, n=out_features, k=in_features, tile=tile, sm_count=lane.sm_cap, dtype=x.dtype
        )
        library.gemm(
            x=x,
            weight=weight,
            out=out,
            bias=bias,
            residual=residual,
            tile=tile,
            sm_count=lane.sm_cap,
            workspace=self._streams.current(x.device).buffer("gemm", size, x.device),
        )

    def rope_append(
        self,
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
        self._check.first("qkv", qkv, (None, None))
        self._check.caches(k_cache, v_cache, qkv.dtype)
        num_pages, kv_heads, page_size, head_dim = k_cache.shape
        if head_dim % 2:
            raise ValueError(f"k_cache has heads of {head_dim}; rotation needs an even number")
        tokens, width = qkv.shape
        heads = width // head_dim - 2 * kv_heads
        if heads < 1 or width % head_dim:
            raise ValueError(
                f"qkv has rows of {width}; expected a multiple of head_dim {head_dim}, "
                f"with more than the {2 * kv_heads} heads of K and V"
            )
        self._check.tensor("out", out, qkv.dtype, (tokens, heads * head_dim))
        self._check.tensor("positions", positions, torch.int64, (tokens,))
        self._check.tensor("slots", slots, torch.int64, (tokens,))
        self._check.tensor("cos_sin", cos_sin, torch.float32, (None, head_dim))
        self._check.contiguous("cos_sin", cos_sin)
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is not None:
                self._check.tensor(name, norm, qkv.dtype, (head_dim,))
        if not tokens:
            return
        if not takes_rope(qkv.dtype, kv_heads, head_dim):
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
        module, state = self._library(), self._streams.current(qkv.device)
        source = _read(qkv).unflatten(1, (-1, head_dim))
        q, k, v = source.split([heads, kv_heads, kv_heads], dim=1)
        size = tokens * kv_heads * head_dim * qkv.element_size()
        rotated = state.buffer("rope", size, qkv.device).view(qkv.dtype).view(k.shape)
        written = _written(out)
        # FlashInfer's rotation is in place, so that both go first where they have to be.
        for part, weight, target in (
            (q, q_norm, written.unflatten(1, (-1, head_dim))),
            (k, k_norm, rotated),
        ):
            if weight is None:
                target.copy_(part)
            else:
                module.norm.rmsnorm(part, weight, eps, out=target)
        module.rope.apply_rope_with_cos_sin_cache_inplace(
            positions, written, rotated.flatten(1), head_dim, cos_sin
        )
        _finish(out, written)
        # One request, number 0, that has the whole cache as its pages: its positions are the slots.
        requests = state.buffer("requests", tokens * 4, qkv.device).view(torch.int32)
        places = state.buffer("slots", tokens * 4, qkv.device).view(torch.int32).copy_(slots)
        module.page.append_paged_kv_cache(
            rotated,
            v,
            requests,
            places,
            (k_cache, v_cache),
            *self._whole_cache(num_pages, page_size, qkv.device),
            kv_layout="HND",
        )

    def _whole_cache(
        self, num_pages: int, page_size: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        """A request's pages, first page and end, and length of the last: all that there are."""
        key = device, num_pages
        if key not in self._whole_caches:
            numbers = ([*range(num_pages)], [0, num_pages], [page_size])
            self._whole_caches[key] = tuple(
                torch.tensor(n, dtype=torch.int32, device=device) for n in numbers
            )
        return self._whole_caches[key]

    def prefill_attention(
        self,
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
        """As `reference.prefill_attention`; by FlashAttention-3 on Hopper, else by 2."""
        self._check.tensor("seq_lens", seq_lens, torch.int32, (None,))
        self._check.tensor("query_start", query_start, torch.int32, (seq_lens.shape[0] + 1,))
        self._check.contiguous("query_start", query_start)
        arguments: dict[str, Any] = {
            "q": q,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "page_table": page_table,
            "seq_lens": seq_lens,
            "scale": scale,
            "window": window,
            "out": out,
            "soft_cap": soft_cap,
            "lse": lse,
        }
        if not self._attend("auto", query_start=query_start, **arguments):
            reference.prefill_attention(query_start=query_start, **arguments)

    def decode_attention(
        self,
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
        """As `reference.decode_attention`; by FlashAttention-2, which splits long requests."""
        self._check.first("q", q, (None, None))
        self._check.tensor("seq_lens", seq_lens, torch.int32, (q.shape[0],))
        arguments: dict[str, Any] = {
            "q": q,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "page_table": page_table,
            "seq_lens": seq_lens,
            "scale": scale,
            "window": window,
            "out": out,
            "soft_cap": soft_cap,
            "lse": lse,
        }
        if not self._attend("fa2", query_start=None, **arguments):
            reference.decode_attention(**arguments)

    def _attend(
        self,
        backend: str,
        *,
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
        """Check the arguments, and compute; False where FlashInfer does not take them."""
        self._check.first("q", q, (None, None))
        self._check.caches(k_cache, v_cache, q.dtype)
        num_pages, kv_heads, page_size, head_dim = k_cache.shape
        rows, width = q.shape
        if not width or width % (kv_heads * head_dim):
            raise ValueError(
                f"q has rows of {width}; expected a multiple of "
                f"{kv_heads} KV heads * head_dim {head_dim}"
            )
        heads = width // head_dim
        self._check.tensor("out", out, q.dtype, (rows, width))
        self._check.tensor("page_table", page_table, torch.int32, (seq_lens.shape[0], None))
        self._check.contiguous("seq_lens", seq_lens)
        if window < 0:
            raise ValueError(f"window is {window}; expected 0 (all keys) or a number of keys")
        if not 0 <= soft_cap < math.inf:
            raise ValueError(f"soft_cap is {soft_cap}; expected 0 (none) or a positive number")
        if lse is not None:
            self._check.tensor("lse", lse, torch.float32, (rows, heads))
            self._check.contiguous("lse", lse)
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
        written = _written(out, contiguous=True)
        with self._plans.planned(
            shape, page_table, seq_lens, query_start, num_pages=num_pages, rows=rows
        ) as wrapper:
            wrapper.run(
                _read(q).unflatten(1, (heads, head_dim)),
                (k_cache, v_cache),
                out=written.unflatten(1, (heads, head_dim)),
                lse=lse,
                return_lse=lse is not None,
            )
        _finish(out, written)
        if lse is not None:
            lse.mul_(_LN_2)  # FlashInfer's logarithm is to base 2
        return True

    def merge_attention(
        self,
        *,
        a: Tensor,
        lse_a: Tensor,
        b: Tensor,
        lse_b: Tensor,
        out: Tensor,
        lse_out: Tensor,
    ) -> None:
        """As `reference.merge_attention`."""
        self._check.first("a", a, (None, None))
        self._check.tensor("b", b, a.dtype, tuple(a.shape))
        self._check.tensor("out", out, a.dtype, tuple(a.shape))
        self._check.tensor("lse_a", lse_a, torch.float32, (a.shape[0], None))
        heads = lse_a.shape[1]
        for name, lse in (("lse_a", lse_a), ("lse_b", lse_b), ("lse_out", lse_out)):
            self._check.tensor(name, lse, torch.float32, (a.shape[0], heads))
            self._check.contiguous(name, lse)
        if heads < 1 or a.shape[1] % heads:
            raise ValueError(
                f"a has rows of {a.shape[1]}; expected a multiple of lse_a's {heads} heads"
            )
        reference.merge_attention(a=a, lse_a=lse_a, b=b, lse_b=lse_b, out=out, lse_out=lse_out)

    def swiglu(self, *, gate_up: Tensor, out: Tensor) -> None:
        """As `reference.swiglu`."""
        self._check.first("gate_up", gate_up, (None, None))
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        if gate_up.shape[1] % 2:
            raise ValueError(f"gate_up has rows of {gate_up.shape[1]}; expected an even number")
        self._check.tensor("out", out, gate_up.dtype, (rows, width))
        if not rows:
            return
        if not takes_rows(gate_up.dtype, width):
            reference.swiglu(gate_up=gate_up, out=out)
            return
        # FlashInfer reads and writes rows without gaps.
        written = _written(out, contiguous=True)
        source = _read(gate_up) if gate_up.is_contiguous() else gate_up.contiguous()
        self._library().activation.silu_and_mul(source, out=written)
        _finish(out, written)

    def moe_route(
        self, *, router_logits: Tensor, normalize: bool, expert_ids: Tensor, expert_weights: Tensor
    ) -> None:
        """As `reference.moe_route`."""
        self._check.first("router_logits", router_logits, (None, None))
        tokens, experts = router_logits.shape
        self._check.tensor("expert_ids", expert_ids, torch.int64, (tokens, None))
        chosen = expert_ids.shape[1]
        self._check.tensor("expert_weights", expert_weights, torch.float32, (tokens, chosen))
        if not 1 <= chosen <= experts:
            raise ValueError(
                f"expert_ids has rows of {chosen}; expected 1 to {experts}, the experts there are"
            )
        reference.moe_route(
            router_logits=router_logits,
            normalize=normalize,
            expert_ids=expert_ids,
            expert_weights=expert_weights,
        )

    def moe_experts(
        self,
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
        """As `reference.moe_experts`; two grouped products, without waiting for the device.

        torch's grouped product has no `out=`, so that what lies between comes from torch's
        allocator.
        """
        self._check.first("x", x, (None, None))
        tokens, hidden = x.shape
        self._check.tensor("expert_ids", expert_ids, torch.int64, (tokens, None))
        chosen = expert_ids.shape[1]
        self._check.tensor("expert_weights", expert_weights, torch.float32, (tokens, chosen))
        self._check.tensor("down", down, x.dtype, (None, hidden, None))
        experts, _, inner = down.shape
        self._check.tensor("gate_up", gate_up, x.dtype, (experts, 2 * inner, hidden))
        self._check.tensor("residual", residual, x.dtype, (tokens, hidden))
        self._check.tensor("out", out, x.dtype, (tokens, hidden))
        if not tokens:
            return
        if not takes_grouped(x.dtype, hidden, inner):
            reference.moe_experts(
                x=x,
                expert_ids=expert_ids,
                expert_weights=expert_weights,
                gate_up=gate_up,
                down=down,
                residual=residual,
                out=out,
            )
            return
        sorted_ids, order = expert_ids.flatten().sort(stable=True)
        numbers = torch.arange(experts, device=x.device)
        ends = torch.searchsorted(sorted_ids, numbers, right=True, out_int32=True)
        rows = torch.div(order, chosen, rounding_mode="floor")
        mixed = torch._grouped_mm(x[rows], gate_up.transpose(1, 2), offs=ends)
        inside = torch.empty(len(rows), inner, dtype=x.dtype, device=x.device)
        self.swiglu(gate_up=mixed, out=inside)
        result = torch._grouped_mm(inside, down.transpose(1, 2), offs=ends)
        by_choice = torch.empty_like(result)
        by_choice[order] = result
        weighted = by_choice.unflatten(0, (tokens, chosen)).float() * expert_weights.unsqueeze(2)
        out.copy_(weighted.sum(dim=1).add_(residual))

    def sample(
        self,
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
        """As `sampling.sample`."""
        self._check.tensor("logits", logits, torch.float32, (None, None))
        rows, vocab_size = logits.shape
        for name, values, dtype in (
            ("temperature", temperature, torch.float32),
            ("top_k", top_k, torch.int64),
            ("top_p", top_p, torch.float32),
            ("min_p", min_p, torch.float32),
            ("uniform", uniform, torch.float32),
            ("out", out, torch.int64),
        ):
            self._check.tensor(name, values, dtype, (rows,))
        if rows and not vocab_size:
            raise ValueError("logits has rows of 0; expected at least one token to choose from")
        reference.sample(
            logits=logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            uniform=uniform,
            out=out,
        )

    def functions(self) -> Mapping[str, Callable[..., None]]:
        """Every operation by its name, its tensors kept alive by the lane it is queued on."""
        return MappingProxyType(
            {name: _kept_by_lane(getattr(self, name)) for name in OPERATION_NAMES}
        )


@functools.cache
def _built_library(device: torch.device) -> CudaLibrary | None:
    return load() if torch.cuda.get_device_capability(device) == (9, 0) else None


def _kept_by_lane(operation: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(operation)
    def call(**arguments: Any) -> None:
        operation(**arguments)
        lane = current_lane()
        if lane is not None:
            lane.keep(arguments)

    return call
