"""Calls of every operation but the products and attention, and the work that each is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from gpu_bench import ELEMENT, Bench, Call
from torch import Tensor

from nf_kernels import cost


class OperationCase(NamedTuple):
    """An operation at some number of rows.

    Attributes:
        make: Makes a call with tensors of its own.
        work: What a call does.
        nbytes: About the bytes that it touches; `Bench.copies` says how many calls they need.
    """

    make: Callable[[], Call]
    work: cost.Cost
    nbytes: int


def operation_cases(bench: Bench, count: int) -> dict[str, OperationCase]:
    """The case of each operation by its name, with `count` rows."""
    s, device, set_ = bench.sizes, bench.device, bench.operations
    costs = cost.COSTS

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=device)

    def calls(name: str, **tensors: Tensor | float | int | bool) -> Call:
        return partial(set_[name], **tensors)

    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    pages = max(2, count // s.page_size + 1)
    cache_shape = (pages, s.kv_heads, s.page_size, s.head_dim)
    angles = torch.rand(4096, s.head_dim, device=device)

    def rope() -> Call:
        return calls(
            "rope_append",
            qkv=bench.rows(count, width),
            positions=integers(4096, count),
            slots=torch.randperm(pages * s.page_size, device=device)[:count],
            cos_sin=angles,
            k_cache=torch.zeros(cache_shape, dtype=torch.bfloat16, device=device),
            v_cache=torch.zeros(cache_shape, dtype=torch.bfloat16, device=device),
            out=bench.rows(count, s.heads * s.head_dim),
        )

    def merge() -> Call:
        a, b = (bench.rows(count, s.heads * s.head_dim) for _ in range(2))
        lse = [torch.randn(count, s.heads, device=device) for _ in range(2)]
        return calls("merge_attention", a=a, lse_a=lse[0], b=b, lse_b=lse[1], out=a, lse_out=lse[0])

    def route() -> Call:
        return calls(
            "moe_route",
            router_logits=bench.rows(count, s.experts),
            normalize=True,
            expert_ids=torch.empty(count, s.experts_per_token, dtype=torch.int64, device=device),
            expert_weights=torch.empty(count, s.experts_per_token, device=device),
        )

    gate_up = bench.rows(s.experts, 2 * s.expert_inner, s.hidden, scale=s.hidden**-0.5)
    down = bench.rows(s.experts, s.hidden, s.expert_inner, scale=s.expert_inner**-0.5)
    packed = {"gate_up": set_.pack(gate_up), "down": set_.pack(down)}
    needed = set_.scratch_bytes(
        "moe_experts", tokens=count, experts_per_token=s.experts_per_token, **packed
    )

    def experts() -> Call:
        scores = torch.rand(count, s.experts, device=device)
        out = bench.rows(count, s.hidden)
        return calls(
            "moe_experts",
            x=bench.rows(count, s.hidden),
            expert_ids=scores.topk(s.experts_per_token).indices,
            expert_weights=torch.rand(count, s.experts_per_token, device=device),
            residual=out,
            out=out,
            scratch=torch.empty(needed, dtype=torch.uint8, device=device),
            **packed,
        )

    def draw() -> Call:
        parameters = {"temperature": 0.8, "top_p": 1.0, "min_p": 0.0, "uniform": 0.5}
        size = set_.scratch_bytes("sample", vocab_size=s.vocabulary)
        return calls(
            "sample",
            logits=torch.randn(count, s.vocabulary, device=device),
            top_k=torch.zeros(count, dtype=torch.int64, device=device),
            out=torch.empty(count, dtype=torch.int64, device=device),
            scratch=torch.empty(size, dtype=torch.uint8, device=device),
            **{n: torch.full((count,), v, device=device) for n, v in parameters.items()},
        )

    def by_slot(name: str, ids: str) -> Callable[[], Call]:
        def make() -> Call:
            slots = torch.arange(count, device=device)
            return calls(name, **{ids: slots - 1}, slots=slots, last_sampled=slots.clone())

        return make

    table = bench.rows(s.vocabulary, s.hidden)
    weight = bench.rows(s.hidden)
    row_bytes = count * s.hidden * ELEMENT
    touched = min(s.experts, count * s.experts_per_token)
    return {
        "embedding": OperationCase(
            lambda: calls(
                "embedding",
                token_ids=integers(s.vocabulary, count),
                table=table,
                out=bench.rows(count, s.hidden),
            ),
            costs["embedding"](rows=count, features=s.hidden, element_bytes=ELEMENT),
            2 * row_bytes,
        ),
        "gather_rows": OperationCase(
            lambda: calls(
                "gather_rows",
                x=bench.rows(count, s.hidden),
                index=integers(count, count),
                out=bench.rows(count, s.hidden),
            ),
            costs["gather_rows"](rows=count, features=s.hidden, element_bytes=ELEMENT),
            2 * row_bytes,
        ),
        "rms_norm": OperationCase(
            lambda: calls(
                "rms_norm",
                x=bench.rows(count, s.hidden),
                weight=weight,
                eps=1e-5,
                out=bench.rows(count, s.hidden),
                residual=bench.rows(count, s.hidden),
            ),
            costs["rms_norm"](rows=count, features=s.hidden, element_bytes=ELEMENT, residual=True),
            3 * row_bytes,
        ),
        "rope_append": OperationCase(
            rope,
            costs["rope_append"](
                rows=count,
                heads=s.heads,
                kv_heads=s.kv_heads,
                head_dim=s.head_dim,
                element_bytes=ELEMENT,
            ),
            2 * count * width * ELEMENT,
        ),
        "merge_attention": OperationCase(
            merge,
            costs["merge_attention"](
                rows=count, heads=s.heads, head_dim=s.head_dim, element_bytes=ELEMENT
            ),
            2 * row_bytes,
        ),
        "swiglu": OperationCase(
            lambda: calls(
                "swiglu", gate_up=bench.rows(count, 2 * s.inner), out=bench.rows(count, s.inner)
            ),
            costs["swiglu"](rows=count, features=s.inner, element_bytes=ELEMENT),
            3 * count * s.inner * ELEMENT,
        ),
        "moe_route": OperationCase(
            route,
            costs["moe_route"](
                rows=count,
                experts=s.experts,
                experts_per_token=s.experts_per_token,
                element_bytes=ELEMENT,
                normalize=True,
            ),
            count * s.experts * ELEMENT,
        ),
        "moe_experts": OperationCase(
            experts,
            costs["moe_experts"](
                rows=count,
                features=s.hidden,
                expert_features=s.expert_inner,
                experts_per_token=s.experts_per_token,
                experts_touched=touched,
                element_bytes=ELEMENT,
            ),
            gate_up.nbytes + down.nbytes,
        ),
        "sample": OperationCase(
            draw,
            costs["sample"](rows=count, vocabulary=s.vocabulary),
            count * s.vocabulary * 4,
        ),
        "feed_sampled": OperationCase(
            by_slot("feed_sampled", "token_ids"), costs["feed_sampled"](rows=count), count * 8
        ),
        "keep_sampled": OperationCase(
            by_slot("keep_sampled", "sampled"), costs["keep_sampled"](rows=count), count * 8
        ),
    }
