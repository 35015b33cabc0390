"""Proof that a schedule orders every read after its write, on any device. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from nf_runtime.graph import BatchInput, Rows
from nf_runtime.pipeline.division import Division
from nf_runtime.pipeline.schedule import AFTER_APPEND, BEFORE_APPEND, Code, Node, Schedule
from nf_runtime.pipeline.workspace import Layout, Workspace

_UNIT = 2  # bytes: of the smallest element


@dataclass(frozen=True, slots=True)
class Race:
    """Two nano-operations that use the same memory as the model does not.

    Attributes:
        first: Who comes first in the model.
        second: Who comes second.
        memory: What both use.
        is_ordered: False where the second may not wait for the first. True where it does, and the
            first has overwritten what the second reads.
    """

    first: str
    second: str
    memory: str
    is_ordered: bool = False

    def __str__(self) -> str:
        if self.is_ordered:
            return f"{self.first} overwrites what {self.second} reads: both use {self.memory}"
        return f"{self.second} is not ordered after {self.first}: both use {self.memory}"


@dataclass(frozen=True, slots=True)
class _Use:
    """A rectangle of memory: rows (or tokens of a request) by bytes."""

    node: int
    writes: bool
    rows: tuple[int, int]
    columns: tuple[int, int]
    name: str

    def meets(self, other: _Use) -> bool:
        return (
            (self.writes or other.writes)
            and _overlap(self.rows, other.rows)
            and _overlap(self.columns, other.columns)
        )


def _overlap(mine: tuple[int, int], other: tuple[int, int]) -> bool:
    return max(mine[0], other[0]) < min(mine[1], other[1])


def find_races(
    schedule: Schedule, division: Division, workspace: Workspace, contexts: np.ndarray
) -> list[Race]:
    """Every use of memory that is not as in the model.

    That is two uses that the schedule does not order, or an edge that is overwritten by another
    before it is read.

    It looks at rows and bytes, and not at what the compiler has found. Vector clocks (Fidge, 1988;
    Mattern, 1989) tell what each lane knows: two uses are ordered where the second one's lane, when
    it comes to it, has heard that the first has ended. A notice that K and V are about to be
    appended counts as a write of them all, one that they were as a read.

    Args:
        schedule: What is checked.
        division: Of a batch.
        workspace: Where its edges are.
        contexts: int [requests], tokens of each request before this batch.

    Raises:
        RuntimeError: Lanes of the schedule wait for each other.
        KeyError: The schedule does not launch one of its nodes.
    """
    clocks, ends = _clocks(schedule)
    races = []
    for uses in _uses(schedule, division, workspace, contexts).values():
        uses.sort(key=lambda use: use.node)
        races += _overwritten(schedule, uses)
        for first, second in combinations(uses, 2):
            if first.node == second.node or not first.meets(second):
                continue
            lane, place = ends[first.node]
            if clocks[second.node][lane] < place:
                nodes = schedule.node(first.node), schedule.node(second.node)
                shared = first.name if first.name == second.name else f"{first.name}, {second.name}"
                races.append(Race(str(nodes[0]), str(nodes[1]), shared))
    return races


def _overwritten(schedule: Schedule, uses: list[_Use]) -> list[Race]:
    """Reads of rows that another edge was written to after the edge itself.

    Args:
        schedule: What is checked.
        uses: Of one buffer, or of the keys and values of one request, in the order of the model.
    """
    races = []
    for end, read in enumerate(uses):
        if read.writes:
            continue
        first = read.rows[0]
        is_lost = np.ones(read.rows[1] - first, dtype=bool)  # not yet found to be written
        before = [use for use in uses[:end] if use.writes and use.node < read.node]
        # What an operation writes beside what it reads must not be in the same memory either.
        own = [use for use in uses if use.writes and use.node == read.node]
        for write in (*(use for use in own if use.name != read.name), *reversed(before)):
            low, high = (max(row - first, 0) for row in write.rows)
            if not read.meets(write) or not is_lost[low:high].any():
                continue
            if write.name != read.name:
                nodes = schedule.node(write.node), schedule.node(read.node)
                memory = f"{write.name}, {read.name}"
                races.append(Race(str(nodes[0]), str(nodes[1]), memory, is_ordered=True))
            is_lost[low:high] = False
            if not is_lost.any():
                break
    return races


def _clocks(schedule: Schedule) -> tuple[dict[int, list[int]], dict[int, tuple[int, int]]]:
    """For each node, what its lane knows when it starts; and its lane and place there."""
    count = len(schedule.commands)
    now = [[0] * count for _ in range(count)]
    events: dict[int, list[int]] = {}
    starts: dict[int, list[int]] = {}
    ends: dict[int, tuple[int, int]] = {}
    for lane, code, argument in schedule.launch_order:
        if code is Code.SIGNAL:
            events[argument] = now[lane].copy()
        elif code is Code.WAIT:
            now[lane] = [max(pair) for pair in zip(now[lane], events[argument], strict=True)]
        else:
            starts[argument] = now[lane].copy()
            now[lane][lane] += 1
            ends[argument] = lane, now[lane][lane]
    return starts, ends


def _uses(
    schedule: Schedule, division: Division, workspace: Workspace, contexts: np.ndarray
) -> dict[object, list[_Use]]:
    """What every node reads and writes, by what memory it is in."""
    uses: dict[object, list[_Use]] = defaultdict(list)
    for number in range(len(schedule.nodes)):
        node = schedule.node(number)
        operation = node.operation
        own = division.rows(operation.rows, node.first, node.end)
        for mapping, writes in ((operation.reads, False), (operation.writes, True)):
            for edge in mapping.values():
                place = workspace.places[edge]
                whole = edge in operation.reads_all_rows and not writes
                rows = (0, division.bounds[-1]) if whole else own
                if workspace.buffers[place.buffer].selected:
                    rows = 0, 1
                columns = place.offset, place.offset + place.num_bytes
                if schedule.layout is Layout.BY_EDGE:
                    # Rows behind each other, in a workspace that they fill.
                    begin = place.offset * max(1, division.bounds[-1])
                    low, high = (begin + row * place.num_bytes for row in rows)
                    rows, columns = (low // _UNIT, high // _UNIT), (0, 1)
                uses[place.buffer].append(_Use(number, writes, rows, columns, edge))
        for request, tokens, writes in _cache_tokens(node, division, contexts):
            place_of = node.layer, request
            uses[place_of].append(_Use(number, writes, tokens, (0, 1), f"KV of request {request}"))
    return uses


def _cache_tokens(
    node: Node, division: Division, contexts: np.ndarray
) -> list[tuple[int, tuple[int, int], bool]]:
    """Of which requests a node reads or writes K and V, of which tokens, and whether it writes."""
    operation = node.operation
    if operation in (BEFORE_APPEND, AFTER_APPEND):
        tokens = 0, int(contexts.max(initial=0)) + division.bounds[-1] + 1
        return [(request, tokens, operation == BEFORE_APPEND) for request in range(len(contexts))]
    caches = [
        source
        for source in operation.inputs.values()
        if source in (BatchInput.K_CACHE, BatchInput.V_CACHE)
    ]
    if not caches:
        return []
    writes = bool(operation.updates)
    decodes = division.num_decodes
    found = []
    if operation.rows is not Rows.PREFILL:
        first, end = division.rows(Rows.DECODE, node.first, node.end)
        for request in range(first, end):
            context = int(contexts[request])
            found.append((request, (context if writes else 0, context + 1), writes))
    if operation.rows is not Rows.DECODE:
        first, end = division.rows(Rows.PREFILL, node.first, node.end)
        starts = division.segment_start + decodes
        for segment, prefill in enumerate(division.segment_request.tolist()):
            begin, stop = max(first, int(starts[segment])), min(end, int(starts[segment + 1]))
            if begin < stop:
                request = decodes + prefill
                own = np.flatnonzero(division.segment_request == prefill)[0]
                context = int(contexts[request]) - int(starts[own])
                found.append((request, (context + begin if writes else 0, context + stop), writes))
    return found
