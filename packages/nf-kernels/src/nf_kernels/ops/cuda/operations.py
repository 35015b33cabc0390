"""The operations on a CUDA device, each by what computes it best."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nf_kernels.cuda.library import CudaLibrary, load
from nf_kernels.lanes.cuda import current_lane
from nf_kernels.ops import reference
from nf_kernels.ops.cuda.aligned_rows import ALIGNMENT, finish, is_aligned, to_read, to_write
from nf_kernels.ops.cuda.arguments import Arguments
from nf_kernels.ops.cuda.attention import PagedAttention
from nf_kernels.ops.cuda.stream_states import StreamStates
from nf_kernels.ops.cuda.support import (
    flashinfer,
    takes_grouped,
    takes_rope,
    takes_rows,
)
from nf_kernels.ops.kept_by_lane import kept_by_lane
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
        "feed_sampled",
        "keep_sampled",
    }
)


def _operation(compute: Callable[..., bool]) -> Callable[..., None]:
    """Make an operation of a method that computes what it takes, and tells whether it did.

    The arguments are checked before; what the method does not take is computed in plain torch.
    """
    name = compute.__name__
    in_plain_torch = getattr(reference, name)

    @functools.wraps(compute)
    def operation(self: CudaOperations, **arguments: Any) -> None:
        getattr(self._arguments, name)(**arguments)
        if not compute(self, **arguments):
            in_plain_torch(**arguments)

    return operation


def _checked(check: Callable[..., None], operation: Callable[..., None]) -> Callable[..., None]:
    """An operation of plain torch, after the checks of its arguments."""

    @functools.wraps(operation)
    def call(**arguments: Any) -> None:
        check(**arguments)
        operation(**arguments)

    return call


class CudaOperations:
    """The operations, and the memory they keep for each stream.

    Safe for several threads, as long as each runs on a stream of its own.
    """

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
        self._arguments = check = Arguments(device_type)
        self._streams = StreamStates()
        self._attention = PagedAttention(library, self._streams)
        # Nothing computes these better than plain torch.
        self.embedding = _checked(check.embedding, reference.embedding)
        self.gather_rows = _checked(check.gather_rows, reference.gather_rows)
        self.merge_attention = _checked(check.merge_attention, reference.merge_attention)
        self.moe_route = _checked(check.moe_route, reference.moe_route)
        self.sample = _checked(check.sample, reference.sample)
        self.feed_sampled = _checked(check.feed_sampled, reference.feed_sampled)
        self.keep_sampled = _checked(check.keep_sampled, reference.keep_sampled)

    def functions(self) -> Mapping[str, Callable[..., None]]:
        """Every operation by its name, its tensors kept alive by the lane it is queued on."""
        return MappingProxyType(
            {name: kept_by_lane(getattr(self, name), current_lane) for name in OPERATION_NAMES}
        )

    def prepare(self, batches: Sequence[AttentionBatch]) -> None:
        """As `OperationSet.prepare`."""
        self._attention.prepare(batches)

    @_operation
    def rms_norm(
        self,
        *,
        x: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        residual: Tensor | None = None,
    ) -> bool:
        """As `reference.rms_norm`.

        Where `out` is `x`, sum and norm are one kernel, which normalizes the sum before it is
        rounded to the dtype.
        """
        rows, width = x.shape
        if not rows:
            return True
        if not takes_rows(x.dtype, width):
            return False
        norm = self._library().norm
        weight = to_read(weight.unsqueeze(0)).squeeze(0)
        if residual is not None:
            in_place = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
            if in_place and is_aligned(x) and is_aligned(residual):
                norm.fused_add_rmsnorm(x, residual, weight, eps)
                return True
            residual.add_(x)
            x = residual
        written = to_write(out)
        norm.rmsnorm(to_read(x), weight, eps, out=written)
        finish(out, written)
        return True

    @_operation
    def linear(
        self,
        *,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> bool:
        """As `reference.linear`; on a capped lane by a kernel that keeps to its SMs.

        What the library was not built for, or has no tile for on so few SMs, is left to cuBLAS.
        """
        rows, in_features = x.shape
        out_features = weight.shape[0]
        lane = current_lane()
        operands = [t for t in (x, weight, out, residual) if t is not None]
        library = self._cutlass(x.device) if lane is not None and lane.sm_cap else None
        if (
            lane is None
            or library is None
            or not rows
            or out.dtype != x.dtype
            or not takes_rows(x.dtype, in_features, out_features)
            or not all(map(is_aligned, operands))
            or not (bias is None or bias.data_ptr() % ALIGNMENT == 0)
        ):
            return False
        try:
            tile = library.best_tile(rows, out_features, in_features, lane.sm_cap)
        except ValueError:  # each of its tiles is a cluster of more SMs
            return False
        product: dict[str, Any] = {
            "m": rows,
            "n": out_features,
            "k": in_features,
            "sm_count": lane.sm_cap,
            "dtype": x.dtype,
        }
        if not library.takes(tile, **product):
            return False
        size = library.workspace_bytes(**product, tile=tile)
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
        return True

    @_operation
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
    ) -> bool:
        """As `reference.rope_append`.

        Positions and slots are not looked at: a wrong one reads or writes other memory.
        """
        num_pages, kv_heads, page_size, head_dim = k_cache.shape
        tokens, heads = qkv.shape[0], out.shape[1] // head_dim
        if not tokens:
            return True
        if not takes_rope(qkv.dtype, kv_heads, head_dim):
            return False
        module, state = self._library(), self._streams.current(qkv.device)
        source = to_read(qkv).unflatten(1, (-1, head_dim))
        q, k, v = source.split([heads, kv_heads, kv_heads], dim=1)
        size = tokens * kv_heads * head_dim * qkv.element_size()
        rotated = state.buffer("rope", size, qkv.device).view(qkv.dtype).view(k.shape)
        written = to_write(out)
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
        finish(out, written)
        # One request, number 0, that has the whole cache as its pages: its positions are the slots.
        requests = state.buffer("requests", tokens * 4, qkv.device).view(torch.int32)
        places = state.buffer("slots", tokens * 4, qkv.device).view(torch.int32).copy_(slots)
        module.page.append_paged_kv_cache(
            rotated,
            v,
            requests,
            places,
            (k_cache, v_cache),
            *state.whole_cache(num_pages, page_size, qkv.device),
            kv_layout="HND",
        )
        return True

    @_operation
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
    ) -> bool:
        """As `reference.prefill_attention`; by FlashAttention-3 on Hopper, else by 2."""
        return self._attention.attend(
            backend="auto",
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

    @_operation
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
    ) -> bool:
        """As `reference.decode_attention`; by FlashAttention-2, which splits long requests."""
        return self._attention.attend(
            backend="fa2",
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            page_table=page_table,
            query_start=None,
            seq_lens=seq_lens,
            scale=scale,
            window=window,
            out=out,
            soft_cap=soft_cap,
            lse=lse,
        )

    @_operation
    def swiglu(self, *, gate_up: Tensor, out: Tensor) -> bool:
        """As `reference.swiglu`."""
        if not gate_up.shape[0]:
            return True
        if not takes_rows(gate_up.dtype, out.shape[1]):
            return False
        # FlashInfer reads and writes rows without gaps.
        written = to_write(out, contiguous=True)
        source = to_read(gate_up) if gate_up.is_contiguous() else gate_up.contiguous()
        self._library().activation.silu_and_mul(source, out=written)
        finish(out, written)
        return True

    @_operation
    def moe_experts(
        self,
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
    ) -> bool:
        """As `reference.moe_experts`; two grouped products, which on Hopper wait for nothing.

        Expert ids are not looked at: one that is too large gives its token whatever is in memory,
        a negative one is taken for 0. torch's grouped product has no `out=`, so that what lies
        between comes from torch's allocator.
        """
        tokens, chosen = expert_ids.shape
        experts, hidden, inner = down.shape
        if not tokens:
            return True
        if not (takes_grouped(x.dtype, hidden, inner) and all(map(is_aligned, (gate_up, down)))):
            return False
        ids = expert_ids.flatten()
        if first_expert is not None:  # choices of others go behind the last group
            ids = ids - first_expert
            ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
        sorted_ids, order = ids.sort(stable=True)
        numbers = torch.arange(experts, device=x.device)
        ends = torch.searchsorted(sorted_ids, numbers, right=True, out_int32=True)
        rows = torch.div(order, chosen, rounding_mode="floor")
        mixed = torch.nn.functional.grouped_mm(x[rows], gate_up.transpose(1, 2), offs=ends)
        inside = torch.empty(len(rows), inner, dtype=x.dtype, device=x.device)
        self.swiglu(gate_up=mixed, out=inside)
        result = torch.nn.functional.grouped_mm(inside, down.transpose(1, 2), offs=ends)
        by_choice = torch.empty_like(result)
        by_choice[order] = result
        if first_expert is not None:  # no product has written their rows
            by_choice.masked_fill_((ids == experts).unsqueeze(1), 0.0)
        weighted = by_choice.unflatten(0, (tokens, chosen)).float() * expert_weights.unsqueeze(2)
        total = weighted.sum(dim=1)
        out.copy_(total if residual is None else total.add_(residual))
        return True


@functools.cache
def _built_library(device: torch.device) -> CudaLibrary | None:
    return load() if torch.cuda.get_device_capability(device) == (9, 0) else None
