"""Timelines as Chrome traces, which Perfetto and chrome://tracing open. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nf_runtime.pipeline.utilisation import Utilisation
from nf_runtime.timeline import IterationTrace

_PROCESS = 1
_GAP_US = 20.0  # between iterations, which were not measured one behind the other


def chrome_trace(
    traces: Iterable[IterationTrace], utilisation: Utilisation | None = None
) -> dict[str, Any]:
    """Iterations behind each other: a complete event per nano-operation, a thread per lane.

    Args:
        traces: The iterations.
        utilisation: What tells their use of the device, if that is to be said as well.

    Returns:
        An object of the Trace Event Format; times are microseconds.
    """
    events: list[dict[str, Any]] = []
    threads: dict[str, int] = {}
    origin = 0.0
    for trace in traces:
        names = trace.schedule.plan.lane_names
        for name in names:
            threads.setdefault(name, len(threads))
        for number in trace.ran.tolist():
            node = trace.schedule.node(number)
            start, end = trace.times[number].tolist()
            first, last = trace.token_range(node)
            events.append(
                {
                    "name": node.operation.name,
                    "cat": str(node.category),
                    "ph": "X",
                    "ts": origin + start / 1e3,
                    "dur": (end - start) / 1e3,
                    "pid": _PROCESS,
                    "tid": threads[names[node.lane]],
                    "args": {
                        "iteration": trace.iteration,
                        "layer": node.layer,
                        "nano_batch": node.first
                        if node.end == node.first + 1
                        else f"{node.first}-{node.end - 1}",
                        "tokens": [first, last],
                    },
                }
            )
        events.append(
            {
                "name": f"iteration {trace.iteration}: {trace.schedule.plan.name}",
                "cat": "iteration",
                "ph": "i",
                "s": "p",
                "ts": origin,
                "pid": _PROCESS,
                "tid": 0,
                "args": trace.summary(utilisation),
            }
        )
        origin += trace.wall_ns / 1e3 + _GAP_US
    named = [_metadata("process_name", 0, "NanoFlow")]
    for name, thread in threads.items():
        named += [_metadata("thread_name", thread, f"lane {name}")]
        named += [_metadata("thread_sort_index", thread, thread)]
    return {"traceEvents": named + events, "displayTimeUnit": "ms"}


def _metadata(name: str, thread: int, value: str | int) -> dict[str, Any]:
    key = "sort_index" if isinstance(value, int) else "name"
    return {"name": name, "ph": "M", "pid": _PROCESS, "tid": thread, "args": {key: value}}
