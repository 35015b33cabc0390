"""Attention against the copy's bandwidth and the roofline."""

from __future__ import annotations

from functools import partial

import torch
from gpu_bench import ELEMENT, Bench, Call
from gpu_section_report import Report

from nf_kernels import cost
from nf_kernels.ops import REFERENCE, AttentionBatch


def decode_calls(bench: Bench, requests: int, tokens: int) -> list[Call]:
    """Decode attention over caches of their own, planned by the first call on a stream."""
    s, device = bench.sizes, bench.device
    pages = -(-tokens // s.page_size)
    total = requests * pages
    cache_bytes = 2 * total * s.kv_heads * s.page_size * s.head_dim * ELEMENT
    table = torch.randperm(total, dtype=torch.int32, device=device).view(requests, pages)
    lengths = torch.full((requests,), tokens, dtype=torch.int32, device=device)
    bench.operations.prepare([AttentionBatch(table, lengths)])
    shape = (total, s.kv_heads, s.page_size, s.head_dim)
    return [
        partial(
            bench.operations["decode_attention"],
            q=bench.rows(requests, s.heads * s.head_dim),
            k_cache=bench.rows(*shape),
            v_cache=bench.rows(*shape),
            page_table=table,
            seq_lens=lengths,
            scale=s.head_dim**-0.5,
            window=0,
            out=bench.rows(requests, s.heads * s.head_dim),
        )
        for _ in range(bench.copies(cache_bytes))
    ]


def decode_cost(bench: Bench, requests: int, tokens: int) -> cost.Cost:
    """The work of one such call."""
    s = bench.sizes
    return cost.decode_attention(
        seq_lens=[tokens] * requests,
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        element_bytes=ELEMENT,
    )


def attention(bench: Bench, report: Report) -> None:
    """Decode attention as a share of the copy's bandwidth, and prefill of its roofline."""
    for requests, tokens in bench.sizes.decodes:
        seconds, how = bench.seconds(decode_calls(bench, requests, tokens))
        moved = decode_cost(bench, requests, tokens).bytes_moved
        share = moved / seconds / report.roofs["bytes_per_second"]
        report.row(
            operation="decode_attention",
            requests=requests,
            tokens=tokens,
            set=bench.operations.name,
            seconds=seconds,
            how=how,
            copy_share=share,
        )
        report.measured_operation(
            bench, "decode_attention", **{f"copy_share_{requests}x{tokens}": round(share, 3)}
        )
    s, device = bench.sizes, bench.device
    pages = -(-s.prompt // s.page_size)
    table = torch.randperm(pages, dtype=torch.int32, device=device).view(1, pages)
    lengths = torch.tensor([s.prompt], dtype=torch.int32, device=device)
    start = torch.tensor([0, s.prompt], dtype=torch.int32, device=device)
    bench.operations.prepare([AttentionBatch(table, lengths, start)])
    shape = (pages, s.kv_heads, s.page_size, s.head_dim)
    calls = [
        partial(
            bench.operations["prefill_attention"],
            q=bench.rows(s.prompt, s.heads * s.head_dim),
            k_cache=bench.rows(*shape),
            v_cache=bench.rows(*shape),
            page_table=table,
            query_start=start,
            seq_lens=lengths,
            scale=s.head_dim**-0.5,
            window=0,
            out=bench.rows(s.prompt, s.heads * s.head_dim),
        )
        for _ in range(2)
    ]
    seconds, how = bench.seconds(calls, graph=bench.operations is not REFERENCE)
    work = cost.prefill_attention(
        sequences=[(s.prompt, s.prompt)],
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        element_bytes=ELEMENT,
    )
    share = report.bound(work) / seconds
    report.row(
        operation="prefill_attention",
        tokens=s.prompt,
        set=bench.operations.name,
        seconds=seconds,
        how=how,
        roofline_share=share,
    )
    report.measured_operation(bench, "prefill_attention", roofline_share=round(share, 3))
