"""Matrix products: of the operation set against the roofline, of our library against cuBLAS."""

from __future__ import annotations

from functools import partial

import torch
from gpu_bench import ELEMENT, Bench, Call, first_line
from gpu_section_report import Report
from torch import Tensor

from nf_kernels import cost


def product_operands(bench: Bench, count: int, shape: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Products of `count` rows with weights of their own; the shape is (K, N)."""
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
        for operands in product_operands(bench, count, shape)
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
        operands = product_operands(bench, count, (inner, outer))
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
                report.failed(f"gemm/{tile}", error)
                report.row(product=name, tile=tile, failed=first_line(error))
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
