"""Runs a schedule operation by operation: on streams of a device, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from nf_kernels.cost import Category
from nf_kvcache import IterationOffload
from nf_runtime.bound_graph import BoundGraph
from nf_runtime.device_stream import DeviceStream, Moment
from nf_runtime.node_times import NodeTimes
from nf_runtime.pipeline.schedule import AFTER_APPEND, BEFORE_APPEND, Code, Node, Schedule
from nf_runtime.staged_batch import StagedBatch

LayerHook = Callable[[int, Mapping[str, Tensor]], None]
"""Called with the number of a layer and the batch's rows of every edge."""


def _launch_order(schedule: Schedule) -> Iterable[tuple[int, Code, int]]:
    return schedule.launch_order


class StreamRunner:
    """Gives a schedule's operations to streams from this thread, one by one.

    Args:
        bound: The model.

    Attributes:
        order: Gives the order in which a schedule's commands are given: lane, code and argument of
            each. One stream for all lanes does them in this order.
    """

    def __init__(self, bound: BoundGraph) -> None:
        self.order: Callable[[Schedule], Iterable[tuple[int, Code, int]]] = _launch_order
        self._bound = bound

    def run(
        self,
        schedule: Schedule,
        staged: StagedBatch,
        streams: Sequence[DeviceStream],
        offload: IterationOffload | None,
        *,
        timed: bool = False,
        before_layer: Sequence[LayerHook] = (),
        after_layer: Sequence[LayerHook] = (),
    ) -> NodeTimes | None:
        """Give an iteration to its streams; it may not be done when this returns.

        Args:
            schedule: Of the iteration.
            staged: Its batch.
            streams: Of each lane; the first begins and ends the iteration. All may be one.
            offload: Told of each layer's K and V, where the schedule has that.
            timed: Whether to note when every operation starts and ends.
            before_layer: Called before each layer, of a plan with one lane.
            after_layer: Called after each layer, likewise.

        Returns:
            The times, if they are noted, to be read when the iteration is done.
        """
        events: dict[int, Moment] = {}
        spans: list[tuple[int, Moment, Moment]] = []
        views: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        self._fork(streams)
        layer = -1
        count = len(schedule.graph.layers)
        for lane, code, argument in self.order(schedule):
            stream = streams[lane]
            if code is Code.WAIT:
                stream.wait(events[argument])
                continue
            if code is Code.SIGNAL:
                events[argument] = stream.record()
                continue
            node = schedule.node(argument)
            if node.layer != layer:
                self._call_hooks(after_layer, layer, count, staged, stream)
                layer = node.layer
                self._call_hooks(before_layer, layer, count, staged, stream)
            started = stream.record(timed=True) if timed else None
            self._launch(node, schedule, argument, staged, stream, offload, views)
            if started is not None:
                spans.append((argument, started, stream.record(timed=True)))
        self._join(streams)
        return NodeTimes.of_moments(len(schedule.nodes), spans) if timed else None

    def _launch(
        self,
        node: Node,
        schedule: Schedule,
        number: int,
        staged: StagedBatch,
        stream: DeviceStream,
        offload: IterationOffload | None,
        views: dict[tuple[int, int, int], dict[str, Tensor]],
    ) -> None:
        operation = node.operation
        if operation is BEFORE_APPEND or operation is AFTER_APPEND:
            if offload is not None:
                tell = offload.before_append if operation is BEFORE_APPEND else offload.after_append
                stream.call(partial(tell, node.layer))
            return
        rows = staged.row_range(operation.rows, node.first, node.end)
        if rows[0] == rows[1]:
            return
        part, index = schedule.nodes[number, :2].tolist()
        # Layers that are alike share their views: only weights and caches differ.
        key = (schedule.signature(part, index), node.first, node.end)
        if key not in views:
            requests = staged.division.requests(operation.rows, node.first, node.end)
            views[key] = self._bound.views(operation, rows, requests, staged)
        fixed: Mapping[str, Any] = self._bound.at(part, index).fixed
        function = self._bound.function(operation, node.implementation)
        if operation.category is Category.NETWORK:
            stream.call(partial(function, **fixed, **views[key]))
            return
        with stream:
            function(**fixed, **views[key], **self._bound.scratch(operation, node.lane))

    def _call_hooks(
        self,
        hooks: Sequence[LayerHook],
        layer: int,
        count: int,
        staged: StagedBatch,
        stream: DeviceStream,
    ) -> None:
        """Have hooks called in the order of the stream's work."""
        if hooks and 0 <= layer < count:
            edges = self._bound.edges(staged)
            for hook in hooks:
                stream.call(partial(hook, layer, edges))

    def _fork(self, streams: Sequence[DeviceStream]) -> None:
        """Let the other lanes begin when the first one has come here."""
        others = [stream for stream in streams[1:] if stream is not streams[0]]
        if others:
            begun = streams[0].record()
            for stream in others:
                stream.wait(begun)

    def _join(self, streams: Sequence[DeviceStream]) -> None:
        """Let the first lane go on when all have come here."""
        for stream in streams[1:]:
            if stream is not streams[0]:
                streams[0].wait(stream.record())
