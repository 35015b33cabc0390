"""Pictures of iterations for a terminal: a line per lane, a character per slice of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nf_runtime.timeline import IterationTrace

WIDTH = 96
IDLE = "."
LEGEND = "C compute, M memory, N network, small after the first nano-batch, . nothing"


def middle_layers(trace: IterationTrace) -> tuple[int, int]:
    """The first and the last of the layers in the middle that make a good picture: two, or one."""
    count = len(trace.schedule.graph.layers)
    first = max(0, count // 2 - 1)
    return first, min(first + 1, count - 1)


def span_of(trace: IterationTrace, layers: tuple[int, int]) -> tuple[int, int]:
    """When the first operation of some layers starts, and the last one ends, in ns."""
    parts = trace.schedule.nodes[:, 0]
    ran = (trace.times[:, 1] >= 0) & (parts > layers[0]) & (parts <= layers[1] + 1)
    times = trace.times[ran]
    return (int(times[:, 0].min()), int(times[:, 1].max())) if len(times) else (0, 0)


def draw(
    traces: Mapping[str, IterationTrace], layers: tuple[int, int], *, width: int = WIDTH
) -> list[str]:
    """Draw some layers of several iterations, all on one scale.

    Args:
        traces: By title.
        layers: The first and the last.
        width: Characters of the longest one.
    """
    spans = {title: span_of(trace, layers) for title, trace in traces.items()}
    longest = max((end - start for start, end in spans.values()), default=0)
    slice_ns = max(1, -(-longest // width))
    lines = [
        f"Layers {layers[0]} to {layers[1]} of one iteration, {slice_ns / 1e3:.3g} µs per "
        f"character: {LEGEND}"
    ]
    names = [name for trace in traces.values() for name in trace.schedule.plan.lane_names]
    margin = max((len(name) for name in names), default=0)
    for title, trace in traces.items():
        lines += ["", title]
        for name, slices in lane_lines(trace, spans[title], slice_ns).items():
            lines.append(f"  {name:<{margin}} |{slices}|")
    return lines


def lane_lines(trace: IterationTrace, span: tuple[int, int], slice_ns: int) -> dict[str, str]:
    """For each lane that runs something in a span of time, what it does most in each slice."""
    start, end = span
    count = max(1, -(-(end - start) // slice_ns))
    lines: dict[str, str] = {}
    lanes = trace.schedule.nodes[:, 4]
    for lane, name in enumerate(trace.schedule.plan.lane_names):
        busy: dict[str, np.ndarray] = {}
        for number in np.flatnonzero((lanes == lane) & (trace.times[:, 1] > start)).tolist():
            first, last = trace.times[number].tolist()
            if first < end:
                node = trace.schedule.node(number)
                letter = str(node.category)[0]
                letter = letter.upper() if node.first == 0 else letter
                shares = busy.setdefault(letter, np.zeros(count))
                _add(shares, (max(first, start) - start, min(last, end) - start), slice_ns)
        if busy:
            lines[name] = _letters(list(busy), np.stack(list(busy.values())), slice_ns)
    return lines


def _add(shares: np.ndarray, span: tuple[int, int], slice_ns: int) -> None:
    """Add a span of time to the slices that it falls into."""
    low, high = span
    for number in range(low // slice_ns, min(len(shares), high // slice_ns + 1)):
        begin = number * slice_ns
        shares[number] += max(0, min(high, begin + slice_ns) - max(low, begin))


def _letters(letters: Sequence[str], shares: np.ndarray, slice_ns: int) -> str:
    """The letter with the greatest part of each slice, or none where most of it is idle."""
    idle = slice_ns - shares.sum(axis=0)
    most = shares.argmax(axis=0)
    return "".join(
        letters[most[i]] if shares[most[i], i] > max(0.0, idle[i]) else IDLE
        for i in range(shares.shape[1])
    )
