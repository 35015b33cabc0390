"""Whole iterations of decodes as device graphs: one launch in place of one per operation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from nf_kernels.ops import OperationSet
from nf_kvcache import IterationOffload
from nf_runtime.activations import Activations
from nf_runtime.device_api import DeviceApi
from nf_runtime.device_graph import DeviceGraph
from nf_runtime.padded_decodes import no_decodes, pad_decodes
from nf_runtime.pipeline.division import Division, divide
from nf_runtime.pipeline.plan import Plan
from nf_runtime.pipeline.schedule import Schedule
from nf_runtime.pipeline.schedules import Schedules
from nf_runtime.staged_batch import INPUTS, StagedBatch, stage
from nf_runtime.staging import FixedArrays, StagingBuffer
from nf_runtime.stream_runner import StreamRunner
from nf_scheduler import Batch

_log = logging.getLogger(__name__)

_ROUNDS = 5  # of launches that are timed
_LEAST_GAIN = 1.02  # of a graph, for which it is kept
_TOLERANCE = 0.05  # of the largest logit: streams may cut attention otherwise
_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A batch of some number of decodes by one plan, as the device has recorded it.

    Attributes:
        size: Decodes of it.
        plan: By which it runs.
        division: How that cuts it.
        schedule: That was recorded.
        arrays: Which it reads.
        logits: Which it writes, [size, V].
        work: What was recorded.
        memory: What it works in.
    """

    size: int
    plan: Plan
    division: Division
    schedule: Schedule
    arrays: FixedArrays
    logits: Tensor
    work: DeviceGraph
    memory: tuple[Tensor, ...]


class DeviceGraphs:
    """Captures iterations of decodes, and launches those that gain by it.

    Args:
        api: The device.
        runner: Gives a schedule to its streams.
        schedules: Where they come from.
        operations: That it consists of.
        activations: Where edges are.
        device: Where arrays go.
        sizes: Decodes of a batch, ascending; smaller batches are filled up.
        num_pages: The most that a request has.
        page_size: Token slots of a page.
        padding_page: That no request has; K and V of what fills a batch up go there.

    Attributes:
        launches: Iterations that were launched as a graph; grows.
        gains: For each size that was captured, the time by streams by that as a graph, with next to
            no context, from the batch on the host to the logits.
    """

    def __init__(
        self,
        api: DeviceApi,
        runner: StreamRunner,
        schedules: Schedules,
        operations: OperationSet,
        activations: Activations,
        *,
        device: torch.device,
        sizes: tuple[int, ...],
        num_pages: int,
        page_size: int,
        padding_page: int,
    ) -> None:
        self.launches = 0
        self.gains: dict[int, float] = {}
        self._api = api
        self._device = device
        self._runner = runner
        self._schedules = schedules
        self._operations = operations
        self._activations = activations
        self._sizes = sizes
        self._num_pages = num_pages
        self._page_size = page_size
        self._padding_page = padding_page
        self._captured: dict[int, DecodeGraph] = {}

    @property
    def captured(self) -> tuple[DecodeGraph, ...]:
        """Those that are in use, the largest first."""
        return tuple(self._captured.values())

    def clear(self) -> None:
        """Give up all, when the device is through with them; before lanes are given back."""
        if self._captured:
            self._api.synchronize()
        self._captured.clear()
        self.gains.clear()

    def capture(self, plan_of: Callable[[Batch], Plan]) -> None:
        """Capture a graph for each size, in place of those before.

        Those stay that are faster than their streams and compute the same.

        Args:
            plan_of: Tells by which plan a batch runs.
        """
        self.clear()
        started = time.perf_counter()
        for size in reversed(self._sizes):
            try:
                graph, gain = self._capture(plan_of, size)
            except RuntimeError as error:
                _log.warning("%d decodes run without a device graph: %s", size, error)
                continue
            self.gains[size] = gain
            if gain >= _LEAST_GAIN:
                self._captured[size] = graph
        if self.gains:
            _log.info(
                "device graphs of decodes, by size their gain over streams (used from %.2f): %s; "
                "captured in %.1f s",
                _LEAST_GAIN,
                ", ".join(f"{size}: {gain:.2f}" for size, gain in sorted(self.gains.items())),
                time.perf_counter() - started,
            )

    def find(self, plan: Plan, batch: Batch) -> DecodeGraph | None:
        """The graph by which a plan runs a batch, if there is one."""
        count = batch.num_decodes
        if not self._captured or batch.num_tokens != count or not batch.samples.all():
            return None
        size = next((size for size in self._sizes if size >= count), 0)
        graph = self._captured.get(size)
        return graph if graph is not None and graph.plan is plan else None

    def pad(
        self, graph: DecodeGraph, batch: Batch, page_tables: np.ndarray
    ) -> tuple[Batch, np.ndarray]:
        """A batch as its graph takes it; `pad_decodes`."""
        return pad_decodes(batch, page_tables, size=graph.size, page=self._padding_page)

    def launch(
        self,
        graph: DecodeGraph,
        staged: StagedBatch,
        buffer: StagingBuffer,
        offload: IterationOffload | None,
    ) -> None:
        """Give an iteration to the device.

        Args:
            graph: Of its size.
            staged: The padded batch.
            buffer: That it was staged in, uploaded.
            offload: Told of each layer's K and V, before and after all of them.
        """
        self._prepare(graph.schedule, staged, buffer, graph.arrays)
        layers = range(len(graph.schedule.graph.layers))
        if offload is not None:
            for layer in layers:
                self._api.stream.call(partial(offload.before_append, layer))
        graph.work.launch()
        if offload is not None:
            for layer in layers:
                self._api.stream.call(partial(offload.after_append, layer))
        self.launches += 1

    def _capture(self, plan_of: Callable[[Batch], Plan], size: int) -> tuple[DecodeGraph, float]:
        """A graph, and what it gains.

        Raises:
            RuntimeError: It cannot be captured, or computes something else than its streams.
        """
        batch, _ = self._padding(size, 1)
        plan = plan_of(batch)
        division = divide(plan.nano_batches, size, _NOTHING, selected=size)
        schedule = self._schedules.get(plan, division.structure, notices=False)
        streams = self._api.streams(plan)
        buffer = StagingBuffer(self._device)
        staged = self._stage(schedule, division, buffer, num_pages=self._num_pages)
        arrays = FixedArrays(buffer, [source.name for source in INPUTS])
        fixed = self._prepare(schedule, staged, buffer, arrays)
        work = self._api.capture(partial(self._runner.run, schedule, fixed, streams, None))
        logits = self._activations.rows("logits", 0, size, schedule.layout)
        memory = self._activations.buffers
        graph = DecodeGraph(size, plan, division, schedule, arrays, logits, work, memory)

        def by_streams() -> None:
            own = self._stage(schedule, division, buffer, num_pages=1)
            self._operations.prepare(own.attention(schedule.attention))
            self._runner.run(schedule, own, streams, None)

        def by_graph() -> None:
            own = self._stage(schedule, division, buffer, num_pages=1)
            self._prepare(schedule, own, buffer, arrays)
            work.launch()

        seconds_by_streams, expected = self._time(by_streams, logits)
        seconds_by_graph, got = self._time(by_graph, logits)
        furthest, most = float((got - expected).abs().max()), float(expected.abs().max())
        if not furthest <= _TOLERANCE * most:  # so that NaN is no good either
            raise RuntimeError(
                f"its logits are up to {furthest:g} from those of its streams, which are up to "
                f"{most:g}"
            )
        return graph, seconds_by_streams / seconds_by_graph

    def _stage(
        self, schedule: Schedule, division: Division, buffer: StagingBuffer, *, num_pages: int
    ) -> StagedBatch:
        """Send a batch of decodes of nobody."""
        batch, tables = self._padding(division.bounds[-1], num_pages)
        layout = schedule.layout
        staged = stage(batch, division, layout, tables, self._page_size, _NOTHING, {}, buffer)
        buffer.upload()
        return staged

    def _padding(self, size: int, num_pages: int) -> tuple[Batch, np.ndarray]:
        nobody = np.zeros((0, num_pages), dtype=np.int32)
        return pad_decodes(no_decodes(), nobody, size=size, page=self._padding_page)

    def _prepare(
        self, schedule: Schedule, staged: StagedBatch, buffer: StagingBuffer, arrays: FixedArrays
    ) -> StagedBatch:
        """Bring a batch to where its graph reads it, and announce its attention."""
        arrays.take(buffer)
        fixed = replace(staged, buffer=arrays)
        self._operations.prepare(fixed.attention(schedule.attention, device_graph=arrays))
        return fixed

    def _time(self, work: Callable[[], object], logits: Tensor) -> tuple[float, Tensor]:
        """Seconds of some work, and the logits that it writes."""
        seconds = []
        for _ in range(_ROUNDS):
            logits.zero_()
            self._api.synchronize()
            started = time.perf_counter()
            work()
            self._api.synchronize()
            seconds.append(time.perf_counter() - started)
        return median(seconds), logits.clone()
