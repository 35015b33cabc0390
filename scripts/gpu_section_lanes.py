"""Shares of the device: what lanes get done alone, and beside each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from gpu_bench import Bench, Call, Missing
from gpu_section_attention import decode_calls, decode_cost
from gpu_section_products import product_operands
from gpu_section_report import Report
from torch import Tensor

MOST_CALLS = 500  # of a lane in one measurement, which the host must be able to launch


def _works(
    bench: Bench, mechanism: str
) -> dict[str, tuple[list[Callable[[int], Call]], float, str]]:
    """Product, attention and copy: calls by SM count, and how much work one does, in its unit."""
    s = bench.sizes
    shape = s.model["gate_up"]
    requests, tokens = s.decodes[-2]
    attend = decode_calls(bench, requests, tokens)
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
    products = [product_of(operands) for operands in product_operands(bench, s.many_rows, shape)]
    works["product"] = products, 2.0 * s.many_rows * shape[0] * shape[1], "flops_per_second"
    works["copy"] = [copy], 2.0 * size, "bytes_per_second"
    moved = decode_cost(bench, requests, tokens).bytes_moved
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
    # The first has the number of units that is asked for, the second what is left.
    combinations = (("attention", "product"), ("copy", "product"), ("copy", "attention"))
    for mechanism in bench.mechanisms:
        try:
            works = _works(bench, mechanism)
            alone = {}
            for name, (makers, _, _) in works.items():
                with bench.partition([bench.units], "shared") as made:
                    calls = [make(bench.units) for make in makers]
                    alone[name] = bench.lane_seconds(made[0], calls)
            splits = bench.sizes.pair_sms if mechanism != "shared" else bench.sizes.pair_sms[:1]
            for names in combinations:
                for units in splits:
                    _pair(bench, report, mechanism, works, alone, names, units)
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
