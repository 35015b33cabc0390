"""Runs a batch: stages its arrays, runs its plan over the layer graph, samples."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nf_kernels.collectives import Communicator
from nf_kernels.ops import OperationSet
from nf_kvcache import IterationOffload
from nf_runtime.activations import Activations
from nf_runtime.bound_graph import BoundGraph
from nf_runtime.device_api import CpuDevice, make_device_api
from nf_runtime.device_graphs import DeviceGraphs
from nf_runtime.graph import LayerGraph
from nf_runtime.iteration_output import IterationOutput
from nf_runtime.launched_iteration import LaunchedIteration
from nf_runtime.network_operations import NetworkOperations
from nf_runtime.node_times import NodeTimes
from nf_runtime.pipeline.division import Division, divide
from nf_runtime.pipeline.overlap_gain import OverlapGain
from nf_runtime.pipeline.plan import MAX_NANO_BATCHES, Plan, PlanError
from nf_runtime.pipeline.policy import Choice, OverlapPolicy, Reason
from nf_runtime.pipeline.schedule import Schedule
from nf_runtime.pipeline.schedules import Schedules
from nf_runtime.pipeline.workspace import plan_workspace
from nf_runtime.plan_check import check_plan
from nf_runtime.program_runner import ProgramRunner
from nf_runtime.row_logprobs import to_host
from nf_runtime.sampled_ids import SampledIds
from nf_runtime.sampler import SamplingPlan, TokenSampler
from nf_runtime.staged_batch import StagedBatch, stage
from nf_runtime.staging import StagingBuffer, StagingRing
from nf_runtime.stream_runner import LayerHook, StreamRunner
from nf_runtime.timeline import IterationTrace, Timeline
from nf_runtime.weights import ModelWeights
from nf_scheduler import Batch

_Result = TypeVar("_Result")


class Executor:
    """Runs batches of one model on one device.

    `launch` starts an iteration and `poll` gives the result of the oldest. Sampled ids stay on the
    device: the next iteration reads those that the scheduler does not know yet (-1) there. Arrays
    on their way to the device are in a ring of buffers, none of which is written to before the
    device has read it.

    Every iteration runs by a plan, which its policy chooses; the sequential one is a plan as well.

    Attributes:
        before_layer: Hooks called before each layer; as long as there are hooks, iterations run
            sequentially.
        after_layer: Hooks called after each layer.
        before_launch: Told of each iteration before it starts: its batch, page tables, prompt rows
            whose logits are wanted, and plan. Other ranks are told by it.
        sampler: Chooses tokens; requests announce their parameters to it.
        timeline: What ran when, of some iterations.
        workspace: Where edges are.
        stream_runner: Runs plans where programs do not.
        device_graphs: Iterations of decodes that the device has recorded.
    """

    def __init__(
        self,
        graph: LayerGraph,
        weights: ModelWeights,
        kv_layers: list[tuple[Tensor, Tensor]],
        operations: OperationSet,
        sampler: TokenSampler,
        *,
        cos_sin: Tensor,
        page_size: int,
        max_tokens: int,
        max_requests: int,
        policy: OverlapPolicy | None = None,
        asynchronous: bool = False,
        communicator: Communicator | None = None,
        programs: bool = True,
        graph_sizes: tuple[int, ...] = (),
        timeline_every: int = 0,
    ) -> None:
        """Bind the graph to its weights and plan the workspace.

        Args:
            graph: The model.
            weights: Its weights, on the device, all of one dtype.
            kv_layers: K and V of each layer, [pages, heads, page_size, head_dim].
            operations: Implementation of every operation.
            sampler: For the same device.
            cos_sin: float32 [positions, head_dim], on the device.
            page_size: Token slots of a page.
            max_tokens: New tokens of one iteration.
            max_requests: Requests of one iteration, and number of slots.
            policy: Chooses plans; by default the sequential one for all.
            asynchronous: Whether an iteration may be launched while another one is in flight.
            communicator: Of the ranks that run the same batches; None for one alone.
            programs: Whether native operations of a CPU are recorded once and run without Python;
                False gives them to one lane from Python, one by one: the slow twin.
            graph_sizes: Decodes of the batches that are captured as graphs of the device; with any,
                the last page of `kv_layers` is of no request.
            timeline_every: One of so many iterations has its times noted; 0: none.

        Raises:
            PlanError: A plan of the policy does not fit.
        """
        self.before_layer: list[LayerHook] = []
        self.after_layer: list[LayerHook] = []
        self.before_launch: Callable[[Batch, np.ndarray, np.ndarray, Plan], None] | None = None
        self.sampler = sampler
        self.timeline = Timeline(every=timeline_every)
        self._device = cos_sin.device
        self._page_size = page_size
        self._operations = operations
        self._dtype = weights.model["embedding"].dtype
        self.workspace = plan_workspace(graph, self._dtype.itemsize)
        self._activations = Activations(
            graph,
            self.workspace,
            dtype=self._dtype,
            device=self._device,
            max_tokens=max_tokens,
            max_selected=max_requests,
        )
        self._collectives = NetworkOperations(communicator) if communicator is not None else {}
        self._bound = BoundGraph(
            graph,
            weights,
            kv_layers,
            operations,
            self._activations,
            cos_sin=cos_sin,
            collectives=self._collectives,
            max_tokens=max_tokens,
        )
        self._schedules = Schedules(graph, self.workspace)
        self.stream_runner = StreamRunner(self._bound)
        self._sampled_ids = SampledIds(operations, max_requests=max_requests, device=self._device)
        self._api = make_device_api(self._device, operations)
        self._ring = StagingRing(2 if asynchronous else 1, self._device)
        self._launched: deque[LaunchedIteration] = deque()
        self._program_runner: ProgramRunner | None = None
        if isinstance(self._api, CpuDevice) and programs:
            self._program_runner = ProgramRunner(
                self._bound,
                max_tokens=max_tokens,
                max_requests=min(max_requests + MAX_NANO_BATCHES, max_tokens),
                max_selected=max_requests,
            )
        self.device_graphs = DeviceGraphs(
            self._api,
            self.stream_runner,
            self._schedules,
            operations,
            self._activations,
            device=self._device,
            sizes=graph_sizes,
            num_pages=-(-len(cos_sin) // page_size),
            page_size=page_size,
            padding_page=len(kv_layers[0][0]) - 1,
        )
        self._policy = OverlapPolicy(graph)
        self.set_policy(self._policy if policy is None else policy)

    @property
    def workspace_bytes(self) -> int:
        """Of activations, scratch and the table of RoPE."""
        return self._activations.num_bytes + self._bound.num_bytes

    @property
    def policy(self) -> OverlapPolicy:
        """What chooses plans."""
        return self._policy

    def set_policy(self, policy: OverlapPolicy) -> None:
        """Choose plans by another policy, from the next iteration on. Those in flight go on.

        Raises:
            PlanError: A plan does not fit; then all stays as it was.
        """
        plans = policy.plan_set.plans if policy.plan_set is not None else ()
        for plan in plans:
            self.check(plan)
        had_graphs = bool(self.device_graphs.captured)
        self.device_graphs.clear()  # which use the lanes
        self._api.release()
        try:
            for plan in plans:
                self._api.streams(plan)
        except RuntimeError as error:
            self._api.release()  # those of the policy before are made again by who needs them
            if had_graphs:
                self._capture()
            raise PlanError(
                f"plan {plan.name!r} cannot have its lanes on this device: {error}"
            ) from error
        given_up = self._bound.reserve_scratch(policy.lanes_of("moe_experts"))
        if given_up and self._program_runner is not None:  # its blocks would keep the scratch
            self._program_runner.rebind(self._activations.num_selected)
        self._policy = policy
        self.timeline.gain = OverlapGain()
        self._capture()

    def _capture(self) -> None:
        """Capture the device graphs of the policy's plans."""
        with torch.inference_mode(), self._api.stream:
            self.device_graphs.capture(lambda batch: self.choose(batch).plan)

    def check(self, plan: Plan) -> None:
        """Refuse a plan that cannot be run here.

        Raises:
            PlanError: As `check_plan`.
        """
        check_plan(plan, self._schedules, self._bound)

    def launch(
        self,
        batch: Batch,
        page_tables: np.ndarray,
        offload: IterationOffload | None = None,
        *,
        choice: Choice | None = None,
    ) -> None:
        """Start one iteration, after those that were launched before.

        Args:
            batch: What to run.
            page_tables: int32 [requests, pages], pages of each request in order.
            offload: Told when K and V of a layer are about to be written, and when they were.
            choice: The plan to run it by; by default what the policy chooses.
        """
        if choice is None:
            choice = self.timeline.revise(
                self.choose(batch), self._policy.sequential, batch.num_tokens, batch.num_decodes
            )
        self._launch(batch, page_tables, offload, choice, timed=self.timeline.count(choice))

    def trace(self, batch: Batch, page_tables: np.ndarray, choice: Choice) -> IterationTrace:
        """Run an iteration by a plan, wait for it, and tell how it ran.

        Args:
            batch: What to run.
            page_tables: int32 [requests, pages], pages of each request in order.
            choice: The plan.

        Raises:
            RuntimeError: Another iteration is in flight.
        """
        if self._launched:
            raise RuntimeError("trace was called with iterations in flight; poll them first")
        self._launch(batch, page_tables, None, choice, timed=True)
        launched = self._launched.popleft()
        try:
            launched.collect()
        except BaseException:
            self.drain()  # until then the device drops what is given to it
            raise
        trace = launched.read_trace()
        if trace is None:
            raise RuntimeError("the iteration was not timed")
        return trace

    def measure(self, measurement: Callable[..., _Result]) -> _Result:
        """Call a measurement of the device with `operations`, `stream`, `dtype` and `device`.

        Raises:
            RuntimeError: An iteration is in flight.
        """
        if self._launched:
            raise RuntimeError("measure was called with iterations in flight; poll them first")
        return measurement(
            self._operations, self._api.stream, dtype=self._dtype, device=self._device
        )

    def _launch(
        self,
        batch: Batch,
        page_tables: np.ndarray,
        offload: IterationOffload | None,
        choice: Choice,
        *,
        timed: bool,
    ) -> None:
        """Start one iteration by a plan."""
        sampling = self.sampler.plan(batch)
        if self.before_launch is not None:
            self.before_launch(batch, page_tables, sampling.prompt_rows, choice.plan)
        num_selected = len(sampling.slots) + len(sampling.prompt_rows)
        graph = None
        if not (timed or len(sampling.prompt_rows) or choice.reason is Reason.HOOKS):
            graph = self.device_graphs.find(choice.plan, batch)
        padded = batch
        if graph is not None:
            padded, page_tables = self.device_graphs.pad(graph, batch, page_tables)
            division, schedule = graph.division, graph.schedule
        else:
            self._reserve_selected(num_selected)
            division = _divide(batch, choice.plan, num_selected)
            schedule = self._schedules.get(
                choice.plan, division.structure, notices=offload is not None
            )
        buffer = self._ring.acquire()
        staged = stage(
            padded,
            division,
            schedule.layout,
            page_tables,
            self._page_size,
            sampling.prompt_rows,
            sampling.arrays,
            buffer,
        )
        trace = None
        with torch.inference_mode(), self._api.stream as stream:
            buffer.upload()
            # On a CPU the arrays stay where they are, and are read to the end.
            uploaded = None if self._device.type == "cpu" else stream.record()
            if staged.has_unknown_tokens:
                self._sampled_ids.feed(buffer)
            if graph is not None:
                self.device_graphs.launch(graph, staged, buffer, offload)
                logits = graph.logits
            else:
                logits = self._activations.rows("logits", 0, num_selected, schedule.layout)
                times = self._forward(staged, choice, schedule, offload, timed)
                if timed and times is not None:
                    trace = IterationTrace.of(batch, schedule, division, choice.reason), times
            launched = self._sample(batch, logits, sampling, buffer, trace)
        self._ring.release(uploaded or launched.done)
        self._launched.append(launched)

    def _reserve_selected(self, count: int) -> None:
        """Have room for so many rows whose logits are wanted; device graphs keep what they have."""
        moved = self._activations.reserve_selected(count)
        if moved and self._program_runner is not None:
            self._program_runner.rebind(self._activations.num_selected)

    def call(self, function: Callable[[], object]) -> None:
        """Have a function called on the device, behind what was launched."""
        self._api.stream.call(function)

    def poll(self) -> IterationOutput:
        """Result of the oldest iteration that was launched and not polled; waits for it.

        Raises:
            RuntimeError: There is none.
            Exception: Whatever the iteration has raised.
        """
        if not self._launched:
            raise RuntimeError("poll was called without a launch; call launch first")
        launched = self._launched.popleft()
        output = launched.collect()
        trace = launched.read_trace()
        if trace is not None:
            self.timeline.add(trace)
        return output

    def drain(self) -> None:
        """Wait for all that was launched, and forget it."""
        self._launched.clear()
        self._api.synchronize()

    def close(self) -> None:
        """Forget what was launched, and end."""
        self.drain()
        self.device_graphs.clear()
        self._api.close()

    def choose(self, batch: Batch) -> Choice:
        """The plan of a batch, and why; some of them run sequentially nevertheless, to compare."""
        sequential = self._policy.sequential
        if self.before_layer or self.after_layer:
            return Choice(sequential, Reason.HOOKS)
        choice = self._policy.choose(batch.num_tokens, batch.num_decodes)
        if choice.plan.is_sequential:
            return choice
        several = len(choice.plan.nano_batches) > 1
        if several and _divide(batch, choice.plan, 1).num_occupied < 2:
            return Choice(sequential, Reason.ONE_NANO_BATCH)
        return choice

    def _forward(
        self,
        staged: StagedBatch,
        choice: Choice,
        schedule: Schedule,
        offload: IterationOffload | None,
        timed: bool,
    ) -> NodeTimes | None:
        """Give a plan's operations to the device."""
        self._operations.prepare(staged.attention(schedule.attention))
        streams = self._api.streams(choice.plan)
        if self._program_runner is not None and choice.reason is not Reason.HOOKS:
            return self._program_runner.run(schedule, staged, streams, offload)
        return self.stream_runner.run(
            schedule,
            staged,
            streams if self._program_runner is None else [self._api.stream] * len(streams),
            offload,
            timed=timed,
            before_layer=self.before_layer,
            after_layer=self.after_layer,
        )

    def _sample(
        self,
        batch: Batch,
        logits: Tensor,
        plan: SamplingPlan,
        buffer: StagingBuffer,
        trace: tuple[IterationTrace, NodeTimes] | None,
    ) -> LaunchedIteration:
        """Have tokens chosen by the logits, where they will be."""
        stream = self._api.stream
        num_sampled = len(plan.slots)
        sampled, logprobs = None, None
        if num_sampled:
            sampled, logprobs = self.sampler.sample(logits[:num_sampled], plan, buffer, stream)
            if self._collectives:  # zero on all ranks but the one that samples
                stream.call(partial(self._collectives["all_reduce"], x=sampled, out=sampled))
            self._sampled_ids.keep(sampled, buffer)
            sampled = to_host(sampled)
        prompt_logprobs = self.sampler.prompt_logprobs(plan, logits[num_sampled:], stream)
        return LaunchedIteration(batch, sampled, logprobs, prompt_logprobs, stream.record(), trace)


def _divide(batch: Batch, plan: Plan, num_selected: int) -> Division:
    """How a plan cuts a batch."""
    prefills = np.diff(batch.query_start[batch.num_decodes :])
    return divide(plan.nano_batches, batch.num_decodes, prefills, selected=num_selected)
