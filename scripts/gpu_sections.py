"""Run one section of `make gpu-check` and write what it measures, point by point, to a file.

`python scripts/gpu_sections.py SECTION --out FILE --limit SECONDS [--roofs FILE] [--rehearse]`. A
section has a process of its own: a crash, or a compiler that does not end, takes nothing along.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench, Call, Missing, OutOfTime
from torch import Tensor

from nf_kernels import cost
from nf_kernels.ops import REFERENCE, AttentionBatch

ELEMENT = 2  # bytes of bfloat16
MOST_CALLS = 500  # of a lane in one measurement, which the host must be able to launch


class Report:
    """What a section has found so far, on disk."""

    def __init__(self, path: Path, roofs: dict[str, float]) -> None:
        self._path = path
        self._started = time.monotonic()
        self.roofs = roofs
        self.data: dict[str, Any] = {
            "status": "running",
            "reason": "",
            "seconds": 0.0,
            "rows": [],
            "functions": {},
        }

    def row(self, **values: Any) -> None:
        """Add a line to the section's table."""
        self.data["rows"].append(values)
        self.save()
        print("  " + ", ".join(f"{k} {_shown(v)}" for k, v in values.items()), flush=True)

    def measured(self, function: str, **detail: Any) -> None:
        """Say that a function of the project was run and timed."""
        entry = self.data["functions"].setdefault(function, {"status": "measured", "detail": {}})
        entry["detail"].update(detail)

    def measured_operation(self, bench: Bench, name: str, **detail: Any) -> None:
        """The same of an operation, if it was that of the device and not plain torch."""
        if bench.operations is not REFERENCE:
            self.measured(f"op/{name}", **detail)

    def save(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self._started, 1)
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.data), encoding="utf-8")
        os.replace(unfinished, self._path)

    def bound(self, work: cost.Cost) -> float:
        """Seconds that the roofs allow."""
        return cost.peak_time(
            work,
            flops_per_second=self.roofs["flops_per_second"],
            bytes_per_second=self.roofs["bytes_per_second"],
        )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Roofs


def roofs(bench: Bench, report: Report) -> None:
    """The copy's bandwidth, bytes read and written, and the best rate of a large product."""
    size = bench.sizes.copy_bytes
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    seconds, how = bench.seconds([partial(target.copy_, source)])
    report.row(
        roof="copy", bytes=size, seconds=seconds, how=how, bytes_per_second=2 * size / seconds
    )
    side = bench.sizes.square
    x, weight = bench.rows(side, side), bench.rows(side, side)
    out = torch.empty_like(x)
    seconds, how = bench.seconds([partial(torch.mm, x, weight.t(), out=out)])
    report.row(
        roof="product", side=side, seconds=seconds, how=how, flops_per_second=2 * side**3 / seconds
    )


# Operations against their rooflines


def _operation_cases(
    bench: Bench, count: int
) -> dict[str, tuple[Callable[[], Call], cost.Cost, int]]:
    """For each operation: what makes a call with tensors of its own, the work, the bytes of it."""
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

    table = bench.rows(s.vocabulary, s.hidden)
    weight = bench.rows(s.hidden)
    row_bytes = count * s.hidden * ELEMENT
    touched = min(s.experts, count * s.experts_per_token)
    return {
        "embedding": (
            lambda: calls(
                "embedding",
                token_ids=integers(s.vocabulary, count),
                table=table,
                out=bench.rows(count, s.hidden),
            ),
            costs["embedding"](rows=count, features=s.hidden, element_bytes=ELEMENT),
            2 * row_bytes,
        ),
        "gather_rows": (
            lambda: calls(
                "gather_rows",
                x=bench.rows(count, s.hidden),
                index=integers(count, count),
                out=bench.rows(count, s.hidden),
            ),
            costs["gather_rows"](rows=count, features=s.hidden, element_bytes=ELEMENT),
            2 * row_bytes,
        ),
        "rms_norm": (
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
        "rope_append": (
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
        "merge_attention": (
            merge,
            costs["merge_attention"](
                rows=count, heads=s.heads, head_dim=s.head_dim, element_bytes=ELEMENT
            ),
            2 * row_bytes,
        ),
        "swiglu": (
            lambda: calls(
                "swiglu", gate_up=bench.rows(count, 2 * s.inner), out=bench.rows(count, s.inner)
            ),
            costs["swiglu"](rows=count, features=s.inner, element_bytes=ELEMENT),
            3 * count * s.inner * ELEMENT,
        ),
        "moe_route": (
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
        "moe_experts": (
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
        "sample": (
            draw,
            costs["sample"](rows=count, vocabulary=s.vocabulary),
            count * s.vocabulary * 4,
        ),
    }


def operations(bench: Bench, report: Report) -> None:
    """Every operation but the products and attention, at few and many rows."""
    plain = bench.operations is REFERENCE
    for count in (bench.sizes.few_rows[-2], bench.sizes.many_rows):
        for name, (make, work, nbytes) in _operation_cases(bench, count).items():
            if name == "sample" and count == bench.sizes.many_rows:
                continue  # as many logits are never sampled
            try:
                made = [make() for _ in range(bench.copies(nbytes))]
                waits = name == "sample" or (plain and name == "moe_experts")
                seconds, how = bench.seconds(made, graph=not waits)
            except RuntimeError as error:
                report.row(operation=name, rows=count, failed=str(error).splitlines()[0][:200])
                report.data["functions"].setdefault(
                    f"op/{name}", {"status": "failed", "detail": {"error": str(error)[:500]}}
                )
                continue
            share = report.bound(work) / seconds
            report.row(
                operation=name,
                rows=count,
                set=bench.operations.name,
                seconds=seconds,
                how=how,
                roofline_share=share,
            )
            report.measured_operation(
                bench, name, **{f"roofline_share_at_{count}_rows": round(share, 3)}
            )


# Attention


def _decode_calls(bench: Bench, requests: int, tokens: int) -> list[Call]:
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


def _decode_cost(bench: Bench, requests: int, tokens: int) -> cost.Cost:
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
        seconds, how = bench.seconds(_decode_calls(bench, requests, tokens))
        moved = _decode_cost(bench, requests, tokens).bytes_moved
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


# Products


def _product(bench: Bench, count: int, shape: tuple[int, int]) -> list[dict[str, Tensor]]:
    inner, outer = shape
    copies = bench.copies(inner * outer * ELEMENT)
    return [
        {
            "x": bench.rows(count, inner),
            "weight": bench.rows(outer, inner, scale=inner**-0.5),
            "out": torch.empty(count, outer, dtype=torch.bfloat16, device=bench.device),
        }
        for _ in range(copies)
    ]


def _linear_calls(bench: Bench, count: int, shape: tuple[int, int]) -> list[Call]:
    packed = [
        operands | {"weight": bench.operations.pack(operands["weight"])}
        for operands in _product(bench, count, shape)
    ]
    return [partial(bench.operations["linear"], **operands) for operands in packed]


def products(bench: Bench, report: Report) -> None:
    """Each product of a layer by the operation set, few rows and many, against the roofline."""
    for name, (inner, outer) in bench.sizes.model.items():
        for count in (*bench.sizes.few_rows, bench.sizes.many_rows):
            seconds, how = bench.seconds(_linear_calls(bench, count, (inner, outer)))
            work = cost.linear(
                rows=count, in_features=inner, out_features=outer, element_bytes=ELEMENT
            )
            share = report.bound(work) / seconds
            report.row(
                product=name,
                rows=count,
                seconds=seconds,
                how=how,
                flops_per_second=work.flops / seconds,
                roofline_share=share,
            )
            report.measured_operation(
                bench, "linear", **{f"roofline_share_{name}_{count}": round(share, 3)}
            )


def cutlass(bench: Bench, report: Report) -> None:
    """Our copy, and every tile on every product of a layer at many rows, against cuBLAS."""
    library = bench.library()
    size = bench.sizes.copy_bytes
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
    seconds, how = bench.seconds([partial(library.copy, source, torch.empty_like(source))])
    share = 2 * size / seconds / report.roofs["bytes_per_second"]
    report.row(kernel="copy", bytes=size, seconds=seconds, how=how, copy_share=share)
    report.measured("copy", copy_share=round(share, 3))
    del source
    count = bench.sizes.many_rows
    for name, (inner, outer) in bench.sizes.model.items():
        operands = _product(bench, count, (inner, outer))
        calls = [partial(torch.mm, o["x"], o["weight"].t(), out=o["out"]) for o in operands]
        torch_seconds, _ = bench.seconds(calls)
        chosen = str(library.best_tile(count, outer, inner))
        for tile in map(str, library.tiles):
            if not library.takes(tile, m=count, n=outer, k=inner, sm_count=bench.units):
                continue
            size = library.workspace_bytes(m=count, n=outer, k=inner, tile=tile)
            workspace = torch.empty(max(size, 16), dtype=torch.uint8, device=bench.device)
            calls = [partial(library.gemm, **o, tile=tile, workspace=workspace) for o in operands]
            try:
                seconds, how = bench.seconds(calls)
            except RuntimeError as error:
                text = str(error).splitlines()[0][:200]
                report.row(product=name, tile=tile, failed=text)
                detail = {"error": text}
                report.data["functions"][f"gemm/{tile}"] = {"status": "failed", "detail": detail}
                continue
            ratio = torch_seconds / seconds
            report.row(
                product=name,
                rows=count,
                tile=tile,
                chosen=tile == chosen,
                seconds=seconds,
                how=how,
                flops_per_second=2 * count * inner * outer / seconds,
                cublas_flops_per_second=2 * count * inner * outer / torch_seconds,
                cublas_ratio=ratio,
            )
            report.measured(f"gemm/{tile}", **{f"cublas_ratio_{name}": round(ratio, 3)})


# Shares of the device


def _works(
    bench: Bench, mechanism: str
) -> dict[str, tuple[list[Callable[[int], Call]], float, str]]:
    """Product, attention and copy: calls by SM count, and how much work one does, in its unit."""
    s = bench.sizes
    shape = s.model["gate_up"]
    requests, tokens = s.decodes[-2]
    attend = _decode_calls(bench, requests, tokens)
    size = min(s.copy_bytes, 1 << 30)
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    try:
        library = bench.library()
    except Missing:
        if mechanism == "capped":  # nothing else keeps to a number of SMs
            raise
        library = None

    def product_of(operands: dict[str, Tensor]) -> Callable[[int], Call]:
        def call(sms: int) -> Call:
            if library is None:
                return partial(torch.mm, operands["x"], operands["weight"].t(), out=operands["out"])
            m, (k, n) = s.many_rows, shape
            tile = str(library.best_tile(m, n, k, sms))
            size = library.workspace_bytes(m=m, n=n, k=k, tile=tile, sm_count=sms)
            workspace = torch.empty(max(size, 16), dtype=torch.uint8, device=bench.device)
            return partial(library.gemm, **operands, tile=tile, sm_count=sms, workspace=workspace)

        return call

    def copy(sms: int) -> Call:
        if library is None:
            return partial(target.copy_, source)
        return partial(library.copy, source, target, sms)

    works: dict[str, tuple[list[Callable[[int], Call]], float, str]] = {}
    products = [product_of(operands) for operands in _product(bench, s.many_rows, shape)]
    works["product"] = products, 2.0 * s.many_rows * shape[0] * shape[1], "flops_per_second"
    works["copy"] = [copy], 2.0 * size, "bytes_per_second"
    moved = _decode_cost(bench, requests, tokens).bytes_moved
    # Attention cannot be told a number of SMs: a cap leaves it the whole device.
    works["attention"] = (
        [lambda sms, call=call: call for call in attend],
        float(moved),
        "bytes_per_second",
    )
    return works


def curves(bench: Bench, report: Report) -> None:
    """Product, attention and copy alone, in lanes of more and more units."""
    exclusive, *others = bench.mechanisms
    for mechanism in (exclusive, *(name for name in others if name == "capped")):
        try:
            works = _works(bench, mechanism)
            if mechanism == "capped":
                works.pop("attention")
            for units in bench.sizes.sm_counts:
                with bench.partition([units], mechanism) as made:
                    lane = made[0]
                    for name, (makers, amount, unit) in works.items():
                        calls = [
                            make(len(lane.units) if mechanism == exclusive else units)
                            for make in makers
                        ]
                        seconds = bench.lane_seconds(lane, calls)
                        report.row(
                            mechanism=mechanism,
                            work=name,
                            asked=units,
                            units=round(lane.share * bench.units),
                            seconds=seconds,
                            rate=amount / seconds,
                            unit=unit,
                        )
            report.measured(f"lanes/{mechanism}", curves=True)
        except Missing as missing:
            report.row(mechanism=mechanism, skipped=str(missing))


def pairs(bench: Bench, report: Report) -> None:
    """Two works beside each other: what each keeps of its rate, and what is gained in all."""
    combinations = (("product", "attention"), ("product", "copy"), ("attention", "copy"))
    for mechanism in bench.mechanisms:
        try:
            works = _works(bench, mechanism)
            alone = {}
            for name, (makers, _, _) in works.items():
                with bench.partition([bench.units], "shared") as made:
                    calls = [make(bench.units) for make in makers]
                    alone[name] = bench.lane_seconds(made[0], calls)
            splits = bench.sizes.pair_sms if mechanism != "shared" else bench.sizes.pair_sms[:1]
            for second, first in combinations:
                for units in splits:
                    _pair(bench, report, mechanism, works, alone, (first, second), units)
            report.measured(f"lanes/{mechanism}", pairs=True)
        except Missing as missing:
            report.row(mechanism=mechanism, skipped=str(missing))


def _pair(
    bench: Bench,
    report: Report,
    mechanism: str,
    works: dict[str, tuple[list[Callable[[int], Call]], float, str]],
    alone: dict[str, float],
    names: tuple[str, str],
    units: int,
) -> None:
    with bench.partition([units], mechanism) as made:
        calls, sizes = [], []
        for name, lane in zip(names, made, strict=False):
            sms = max(1, round(lane.share * bench.units))
            # As many as keep a lane with its share busy for the time of a measurement.
            needed = bench.sizes.lane_seconds / alone[name] * sms / bench.units
            count = min(max(1, round(needed)), MOST_CALLS)
            makers = works[name][0]
            ready = [make(sms) for make in makers]
            calls.append([ready[i % len(ready)] for i in range(count)])
            sizes.append(sms)
        whole, each = bench.together(made[:2], calls)
    counts = [len(its) for its in calls]
    after_each_other = sum(count * alone[name] for name, count in zip(names, counts, strict=True))
    kept = [
        count * alone[name] / seconds
        for name, count, seconds in zip(names, counts, each, strict=True)
    ]
    report.row(
        mechanism=mechanism,
        first=names[0],
        second=names[1],
        first_units=sizes[0],
        second_units=sizes[1],
        first_rate_kept=kept[0],
        second_rate_kept=kept[1],
        seconds=whole,
        gain=after_each_other / whole,
    )


SECTIONS: dict[str, Callable[[Bench, Report], None]] = {
    "roofs": roofs,
    "attention": attention,
    "products": products,
    "cutlass": cutlass,
    "curves": curves,
    "pairs": pairs,
    "operations": operations,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--roofs", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    known = json.loads(options.roofs.read_text(encoding="utf-8")) if options.roofs else {}
    report = Report(options.out, known)
    try:
        bench = Bench(rehearse=options.rehearse, limit_s=options.limit)
        with torch.inference_mode():
            SECTIONS[options.section](bench, report)
        report.data["status"] = "done"
    except Missing as missing:
        report.data |= {"status": "skipped", "reason": str(missing)}
    except OutOfTime:
        report.data |= {"status": "cut", "reason": f"its {options.limit:.0f} s were up"}
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        report.data |= {"status": "failed", "reason": reason}
    report.save()
    return 0 if report.data["status"] != "failed" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
