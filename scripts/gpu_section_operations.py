"""Operations against their rooflines."""

from __future__ import annotations

from gpu_bench import Bench, first_line
from gpu_operation_cases import operation_cases
from gpu_section_report import Report

from nf_kernels.ops import REFERENCE


def operations(bench: Bench, report: Report) -> None:
    """Every operation but the products and attention, at few and many rows."""
    plain = bench.operations is REFERENCE
    for count in (bench.sizes.few_rows[-2], bench.sizes.many_rows):
        for name, (make, work, nbytes) in operation_cases(bench, count).items():
            if name == "sample" and count == bench.sizes.many_rows:
                continue  # as many logits are never sampled
            try:
                made = [make() for _ in range(bench.copies(nbytes))]
                waits = name == "sample" or (plain and name == "moe_experts")
                seconds, how = bench.seconds(made, graph=not waits)
            except RuntimeError as error:
                report.failed_operation(bench, name, error)
                report.row(operation=name, rows=count, failed=first_line(error))
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
