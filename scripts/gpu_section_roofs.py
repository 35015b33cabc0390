"""What the device can do at most: `make gpu-check` compares all else with it."""

from __future__ import annotations

from functools import partial

import torch
from gpu_bench import Bench
from gpu_section_report import Report


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
