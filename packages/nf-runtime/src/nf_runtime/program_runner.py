"""Runs a schedule on lanes of a CPU, as one program of recorded operations: without Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nf_kernels.cost import Category
from nf_kernels.lanes import CpuLane, CpuProgram, CpuSchedule, NotRecordable
from nf_kvcache import IterationOffload
from nf_runtime.bound_graph import BoundGraph
from nf_runtime.device_stream import DeviceStream, LaneStream
from nf_runtime.graph import BatchInput, Operation, Rows
from nf_runtime.node_times import NodeTimes
from nf_runtime.pipeline.schedule import AFTER_APPEND, BEFORE_APPEND, Schedule
from nf_runtime.pipeline.workspace import Layout
from nf_runtime.staged_batch import INPUTS, StagedBatch

_MOST = 256  # schedules, over all plans
_TABLES = (BatchInput.DECODE_PAGE_TABLE, BatchInput.PREFILL_PAGE_TABLE)
_PER_TOKEN = (BatchInput.TOKEN_IDS, BatchInput.POSITIONS, BatchInput.SLOTS)


class _Key(NamedTuple):
    """What tells a block from others."""

    part: int
    place: int
    implementation: str | None
    scratch_of_lane: int
    layout: Layout


class _Prepared(NamedTuple):
    """A schedule for the program.

    Attributes:
        native: It, in the program.
        ranges: For each span: token range, first nano-batch and the one behind the last; the first
            span is that of what has no rows of its own.
        called: Numbers of the nano-operations that are called from Python.
    """

    native: CpuSchedule
    ranges: list[tuple[Rows, int, int]]
    called: list[int]


class ProgramRunner:
    """The operations of a model as a program, and its schedules as runs of it.

    Args:
        bound: The model, on a CPU, of native operations.
        max_tokens: Of one iteration.
        max_requests: Of one iteration; a request that is cut counts as often.
        max_selected: Rows of one iteration whose logits are wanted; `rebind` when there are more.
    """

    def __init__(
        self, bound: BoundGraph, *, max_tokens: int, max_requests: int, max_selected: int
    ) -> None:
        self._bound = bound
        self._sizes = max_tokens, max_requests
        self.rebind(max_selected)

    def rebind(self, max_selected: int) -> None:
        """Record anew: edges have moved."""
        max_tokens, max_requests = self._sizes
        self._program = CpuProgram()
        self._placeholders = {
            source: _placeholder(source, max_tokens, max_requests, max_selected)
            for source in INPUTS
        }
        for placeholder in self._placeholders.values():
            self._program.input(placeholder)
        self._blocks: dict[_Key, int] = {}
        self._called: set[int] = set()  # blocks that are called from Python
        self._prepared: OrderedDict[int, tuple[Schedule, _Prepared]] = OrderedDict()

    def run(
        self,
        schedule: Schedule,
        staged: StagedBatch,
        streams: Sequence[DeviceStream],
        offload: IterationOffload | None,
    ) -> NodeTimes:
        """Give an iteration to its lanes, and return at once.

        Args:
            schedule: Of the iteration.
            staged: Its batch.
            streams: Of each lane; the first begins and ends the iteration.
            offload: Told of each layer's K and V, where the schedule has that.

        Returns:
            When each nano-operation ran, to be read when the iteration is done.
        """
        prepared = self._prepare(schedule)
        spans = np.zeros((1 + len(prepared.ranges), 4), dtype=np.int64)
        spans[0] = 0, 1, 0, 0
        for number, (rows, first, end) in enumerate(prepared.ranges, start=1):
            low, high = staged.row_range(rows, first, end)
            spans[number, :2] = low, high - low
            if rows is not Rows.SELECTED:
                low, high = staged.division.requests(rows, first, end)
                spans[number, 2:] = low, high - low
        lanes = [_lane(stream) for stream in streams]
        views = self._views(schedule, prepared, staged)
        run = prepared.native.run(
            lanes,
            spans,
            staged.arrays(),
            on_call=self._caller(schedule, views, streams[0], offload),
        )
        return NodeTimes(run.times)

    def _views(
        self, schedule: Schedule, prepared: _Prepared, staged: StagedBatch
    ) -> dict[int, dict[str, Tensor]]:
        """The arguments of this iteration, for what is called: edges may move before its turn."""
        known: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        found = {}
        for number in prepared.called:
            node = schedule.node(number)
            part, index = schedule.nodes[number, :2].tolist()
            # Layers that are alike share their views.
            key = (schedule.signature(part, index), node.first, node.end)
            if key not in known:
                rows = node.operation.rows
                known[key] = self._bound.views(
                    node.operation,
                    staged.row_range(rows, node.first, node.end),
                    staged.division.requests(rows, node.first, node.end),
                    staged,
                )
            found[number] = known[key]
        return found

    def _caller(
        self,
        schedule: Schedule,
        views: dict[int, dict[str, Tensor]],
        stream: DeviceStream,
        offload: IterationOffload | None,
    ) -> Callable[[int], None]:
        """What does the nano-operations of an iteration that are no recorded ones."""

        def call(number: int) -> None:
            node = schedule.node(number)
            operation = node.operation
            if operation is BEFORE_APPEND or operation is AFTER_APPEND:
                if offload is not None:
                    before = operation is BEFORE_APPEND
                    tell = offload.before_append if before else offload.after_append
                    tell(node.layer)
                return
            part, index = schedule.nodes[number, :2].tolist()
            function = self._bound.function(operation, node.implementation)
            function(
                **self._bound.at(part, index).fixed,
                **views[number],
                **self._bound.scratch(operation, node.lane),
            )

        def attended(number: int) -> None:
            if isinstance(stream, LaneStream):
                stream.attend(call, number)

        return attended

    def _prepare(self, schedule: Schedule) -> _Prepared:
        """A schedule for the program, kept for the next batch alike."""
        known = id(schedule)  # which is kept, and with it its identity
        if known in self._prepared:
            self._prepared.move_to_end(known)
            return self._prepared[known][1]
        layout = schedule.layout
        ranges: dict[tuple[Rows, int, int], int] = {}
        blocks = np.empty(len(schedule.nodes), dtype=np.int32)
        spans = np.zeros(len(schedule.nodes), dtype=np.int32)
        for number in range(len(schedule.nodes)):
            node = schedule.node(number)
            operation = node.operation
            part, index = schedule.nodes[number, :2].tolist()
            if index < 0:
                blocks[number] = self._block(_Key(0, index, None, 0, layout), operation)
                continue
            lane = node.lane if operation.kind == "moe_experts" else 0
            key = _Key(part, index, node.implementation, lane, layout)
            blocks[number] = self._block(key, operation)
            range_of_node = operation.rows, node.first, node.end
            spans[number] = ranges.setdefault(range_of_node, len(ranges) + 1)
        native = self._program.schedule(schedule.commands, blocks, spans)
        called = [
            number
            for number in range(len(blocks))
            if int(blocks[number]) in self._called and schedule.nodes[number, 1] >= 0
        ]
        prepared = _Prepared(native, list(ranges), called)
        self._prepared[known] = schedule, prepared
        if len(self._prepared) > _MOST:
            self._prepared.popitem(last=False)
        return prepared

    def _block(self, key: _Key, operation: Operation) -> int:
        """The number of a block, recorded when it is first asked for."""
        if key not in self._blocks:
            self._blocks[key] = self._record(key, operation)
        return self._blocks[key]

    def _record(self, key: _Key, operation: Operation) -> int:
        if key.place < 0 or operation.category is Category.NETWORK:
            return self._record_call()
        function = self._bound.function(operation, key.implementation)
        arguments: dict[str, Any] = {
            **self._bound.at(key.part, key.place).fixed,
            **self._bound.scratch(operation, key.scratch_of_lane),
        }
        for mapping in (operation.reads, operation.writes):
            for name, edge in mapping.items():
                arguments[name] = self._bound.activations.edge(edge, key.layout)
        for name, source in operation.inputs.items():
            if source in self._placeholders:
                arguments[name] = self._placeholders[source]
        try:
            return self._program.record(function, **_fitted(operation, arguments))
        except NotRecordable:
            return self._record_call()

    def _record_call(self) -> int:
        """A block that is called from Python."""
        block = self._program.call(_never)
        self._called.add(block)
        return block


def _never(number: int) -> None:
    """Stands in a block that every run does itself."""
    raise RuntimeError(f"node {number} was called outside of a run")


def _fitted(operation: Operation, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation with as many rows as they can have together."""
    if operation.rows is not Rows.DECODE:
        return arguments
    # A decode is a request: there are as many rows as there can be requests.
    rows = len(arguments["seq_lens"])
    edges = (*operation.reads, *operation.writes)
    return arguments | {name: arguments[name][:rows] for name in edges}


def _lane(stream: DeviceStream) -> CpuLane:
    if not isinstance(stream, LaneStream):
        raise TypeError(f"stream is a {type(stream).__name__}; expected that of a lane of a CPU")
    return stream.lane


def _placeholder(
    source: BatchInput, max_tokens: int, max_requests: int, max_selected: int
) -> Tensor:
    """A tensor of the most rows that an input has; nothing is ever in it."""
    if source in _PER_TOKEN:
        return torch.empty(max_tokens, dtype=torch.int64)
    if source is BatchInput.SELECTED_ROWS:
        return torch.empty(max_selected, dtype=torch.int64)
    if source in _TABLES:
        return torch.empty((max_requests, 1), dtype=torch.int32)
    more = source is BatchInput.PREFILL_QUERY_START
    return torch.empty(max_requests + more, dtype=torch.int32)
