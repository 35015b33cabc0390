"""`nanoflow timeline`: when operations run, and what overlap gains."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nf_server.commands.failure import fail
from nf_server.commands.flags import as_flags
from nf_server.commands.probing import INTERRUPTED, check_output, probing
from nf_server.gantt import draw, middle_layers

if TYPE_CHECKING:
    from nf_runtime.measured import Measured
    from nf_runtime.pipeline.plan import DevicePeaks
    from nf_runtime.pipeline.policy import Choice
    from nf_runtime.pipeline.utilisation import Utilisation
    from nf_runtime.timeline import IterationTrace

_WHY_SEQUENTIAL = {
    "off": "--overlap is off",
    "no_plan": "no plans were measured for this model on this device: measure some with `nanoflow "
    "plan measure`, or look at one with --overlap nanoflow",
    "no_bucket": "no bucket of the plan set holds such a batch",
    "no_gain": "the plan for such a batch was not measured to be faster",
    "one_nano_batch": "cut by its plan, the batch is in one piece",
    "planned": "the sequential plan was measured to be the best for such a batch",
    "hooks": "somebody looks at each layer",
}


def timeline(
    engine_options: dict[str, Any],
    load: tuple[int, int, int],
    *,
    rounds: int,
    output: str,
    as_json: bool,
) -> int:
    """Run a made-up batch by a plan and sequentially, in turns; the exit code.

    Args:
        engine_options: Fields of `EngineConfig`.
        load: Fields of `Load`.
        rounds: Iterations of each plan.
        output: Where to write the trace.
        as_json: Print one JSON object instead of a table and a picture.
    """
    from nf_runtime import NanoFlowError

    try:
        check_output("--output", output)
        with probing(engine_options) as (engine, probe):
            from nf_runtime.measured import Load

            batch = Load(*load)
            choice = probe.choose(batch)
            plans = [] if choice.plan.is_sequential else [choice.plan]
            with tqdm(
                total=rounds, desc="iterations", leave=False, disable=None, file=sys.stderr
            ) as bar:
                measured = probe.measure(plans, batch, rounds=rounds, progress=bar.update)
            info, peaks = engine.info, probe.peaks
            device, overlap = engine.plan_target.device, engine.config.overlap
            utilisation = probe.utilisation
        _write_trace(measured, utilisation, output)
    except (NanoFlowError, ValueError) as error:
        fail(as_flags(str(error)))
    except OSError as error:
        fail(f"--output is {output!r}, which cannot be written: {error.strerror}")
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    why = _why_nothing_overlapped(choice, measured)
    if as_json:
        values = {
            "model": info.model,
            "device": device,
            "dtype": info.dtype,
            "overlap": overlap,
            "load": batch._asdict(),
            "plan": choice.plan.name,
            "reason": str(choice.reason),
            "nothing_overlapped": why,
            "peaks": peaks.model_dump(),
            "plans": [_values(one, utilisation) for one in measured],
            "trace": output,
        }
        print(json.dumps(values))
        return 0
    print(f"{info.model}, {info.dtype} on {device}; {_batch_text(batch)}; {rounds} iterations each")
    print()
    print("\n".join(_table(measured)))
    print()
    print(_peaks_text(peaks))
    if why is not None:
        print(f"Nothing overlapped: {why}.")
    print()
    shown = {one.plan: _median_trace(one) for one in measured}
    print("\n".join(draw(shown, middle_layers(next(iter(shown.values()))))))
    print(f"\nAll iterations: {output} (open it on https://ui.perfetto.dev)")
    return 0


def _write_trace(measured: list[Measured], utilisation: Utilisation, output: str) -> None:
    """All iterations in the order in which they ran, counted from 0."""
    from nf_runtime.chrome_trace import chrome_trace

    traces = sorted((trace for one in measured for trace in one.traces), key=lambda t: t.iteration)
    numbered = [replace(trace, iteration=number) for number, trace in enumerate(traces)]
    Path(output).write_text(json.dumps(chrome_trace(numbered, utilisation)), encoding="utf-8")


def _why_nothing_overlapped(choice: Choice, measured: list[Measured]) -> str | None:
    """The reason, where no two nano-operations ran at the same time."""
    if choice.plan.is_sequential:
        return _WHY_SEQUENTIAL[str(choice.reason)]
    if measured[-1].overlaps:
        return None
    return (
        f"plan {choice.plan.name} ran, but no two of its operations at the same time; its lanes "
        "are one queue on this device"
    )


def _values(one: Measured, utilisation: Utilisation) -> dict[str, Any]:
    return {
        "plan": one.plan,
        "wall_ms": one.wall_ms,
        "iteration_ms": one.seconds * 1e3,
        "tokens_per_second": one.tokens_per_second,
        "gain": one.gain,
        "gain_quartiles": list(one.quartiles),
        "concurrency": one.concurrency,
        "overlaps": one.overlaps,
        "idle_ms": one.idle_ms,
        "compute_share": one.compute,
        "memory_share": one.memory,
        "network_share": one.network,
        "host_share": one.host_share,
        "iterations": [trace.summary(utilisation) for trace in one.traces],
    }


def _table(measured: list[Measured]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        (
            *("plan", "wall ms", "gain", "quartiles", "concurrency"),
            *("compute", "memory", "network", "CPU beside", "idle ms"),
        )
    ]
    for one in measured:
        low, high = one.quartiles
        idle = one.idle_ms
        lanes = {name: ms for name, ms in idle.items() if name != "device" or len(idle) == 1}
        rows.append(
            (
                one.plan,
                f"{one.wall_ms:.3f}",
                f"{one.gain:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{one.concurrency:.2f}",
                f"{one.compute:.0%}",
                f"{one.memory:.0%}",
                "" if one.network is None else f"{one.network:.0%}",
                f"{one.host_share:.0%}",
                ", ".join(f"{name} {ms:.3f}" for name, ms in lanes.items()),
            )
        )
    if measured[0].network is None:  # one rank
        rows = [(*row[:7], *row[8:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _batch_text(load: Any) -> str:
    decodes = f"{load.decodes} decodes at {load.context} tokens" if load.decodes else ""
    prefill = f"a prefill of {load.prefill}" if load.prefill else ""
    return " and ".join(part for part in (decodes, prefill) if part)


def _peaks_text(peaks: DevicePeaks) -> str:
    names, most = "Compute and memory", f"{peaks.bytes_per_second / 1e9:.3g} GB/s"
    if peaks.sent_per_second:
        names = "Compute, memory and network"
        most += f", and {peaks.sent_per_second / 1e9:.3g} GB/s sent by a rank"
    return (
        f"{names} are parts of what was measured at most: "
        f"{peaks.flops_per_second / 1e12:.3g} TFLOP/s and {most}. "
        "CPU beside is the part of an iteration, from launch to result, in which no operation ran."
    )


def _median_trace(one: Measured) -> IterationTrace:
    """The iteration that took as long as most."""
    return sorted(one.traces, key=lambda trace: trace.wall_ns)[len(one.traces) // 2]
