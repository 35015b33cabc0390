"""Runs a batch: stages its arrays, walks the layer graph, samples. The only forward pass."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nf_kernels.collectives import Communicator
from nf_kernels.cost import Category
from nf_kernels.ops import OperationSet
from nf_kvcache import IterationOffload
from nf_runtime.device_stream import Moment, make_stream
from nf_runtime.graph import BatchInput, Edge, ElementType, LayerGraph, Operation, Rows
from nf_runtime.iteration_output import IterationOutput
from nf_runtime.network_operations import NetworkOperations
from nf_runtime.row_logprobs import PendingLogprobs, to_host
from nf_runtime.sampler import SamplingPlan, TokenSampler
from nf_runtime.staged_batch import StagedBatch, stage
from nf_runtime.staging import StagingRing
from nf_runtime.weights import ModelWeights
from nf_scheduler import Batch, IterationResult

LayerHook = Callable[[int, Mapping[str, Tensor]], None]
"""Called with the number of a layer and the batch's rows of every edge."""

_ELEMENTS = {ElementType.INT64: torch.int64, ElementType.FLOAT32: torch.float32}


@dataclass(frozen=True, slots=True)
class _Launched:
    """An iteration whose work has been given to the device.

    Attributes:
        batch: What it runs.
        sampled: int64 [rows that sample], on its way to the host; None if there are none.
        logprobs: Of sampled tokens.
        prompt_logprobs: Of prompts, each with the position of its first row.
        done: When the device has done everything.
    """

    batch: Batch
    sampled: Tensor | None
    logprobs: PendingLogprobs | None
    prompt_logprobs: list[tuple[int, PendingLogprobs]]
    done: Moment

    def collect(self) -> IterationOutput:
        """The result, once the device has it."""
        self.done.wait()
        self.done.check()
        token_ids = np.zeros(len(self.batch), dtype=np.int32)
        if self.sampled is not None:
            token_ids[self.batch.samples] = self.sampled.numpy()
        logprobs = {}
        if self.logprobs is not None:
            logprobs = dict(zip(self.logprobs.request_ids, self.logprobs.rows(), strict=True))
        prompt_logprobs = {
            pending.request_ids[0]: (position, pending.rows())
            for position, pending in self.prompt_logprobs
        }
        return IterationOutput(
            IterationResult(self.batch.iteration, token_ids), logprobs, prompt_logprobs
        )


@dataclass(frozen=True, slots=True)
class _BoundOperation:
    """An operation with its weights, constants and caches filled in; `signature` says the rest."""

    kind: str
    function: Callable[..., None]
    fixed: dict[str, Any]
    signature: int
    rows: Rows


class Executor:
    """Runs batches of one model on one device.

    `launch` starts an iteration and `poll` gives the result of the oldest. Sampled ids stay on the
    device: the next iteration reads those that the scheduler does not know yet (-1) there. Arrays
    on their way to the device are in a ring of buffers, none of which is written to before the
    device has read it.

    Attributes:
        before_layer: Hooks called before each layer.
        after_layer: Hooks called after each layer.
        sampler: Chooses tokens; requests announce their parameters to it.
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
        asynchronous: bool = False,
        communicator: Communicator | None = None,
    ) -> None:
        """Bind the graph to its weights and plan the buffers.

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
            asynchronous: Whether an iteration may be launched while another one is in flight.
            communicator: Of the ranks that run the same batches; None for one alone.
        """
        self.before_layer: list[LayerHook] = []
        self.after_layer: list[LayerHook] = []
        self.sampler = sampler
        self._device = cos_sin.device
        self._dtype = weights.model["embedding"].dtype
        self._page_size = page_size
        self._cos_sin = cos_sin
        self._operations = operations
        self._stream = make_stream(self._device, operations)
        self._network = None
        if communicator is not None:
            self._network = NetworkOperations(communicator, self._stream)
        self._edges = graph.edges
        self._signatures: list[Operation] = []
        self._selected_edges = graph.selected_edges
        self._buffers = {
            edge.name: self._allocate(
                edge, max_requests if edge.name in self._selected_edges else max_tokens
            )
            for edge in graph.edges.values()
        }
        self._scratch = torch.empty(
            max(
                (
                    self._scratch_bytes(operation, group, max_tokens)
                    for part, group in zip(graph.layers, weights.layers, strict=True)
                    for operation in part
                ),
                default=0,
            ),
            dtype=torch.uint8,
            device=self._device,
        )
        self._prologue = self._bind(graph.prologue, weights.model, None)
        self._layers = [
            self._bind(part, weights.layers[i], kv_layers[i]) for i, part in enumerate(graph.layers)
        ]
        self._epilogue = self._bind(graph.epilogue, weights.model, None)
        self._last_sampled = torch.zeros(max_requests, dtype=torch.int64, device=self._device)
        self._ring = StagingRing(2 if asynchronous else 1, self._device)
        self._launched: deque[_Launched] = deque()

    def launch(
        self, batch: Batch, page_tables: np.ndarray, offload: IterationOffload | None = None
    ) -> None:
        """Start one iteration, after those that were launched before.

        Args:
            batch: What to run.
            page_tables: int32 [requests, pages], pages of each request in order.
            offload: Told when K and V of a layer are about to be written, and when they were.
        """
        plan = self.sampler.plan(batch)
        buffer = self._ring.acquire()
        staged = stage(batch, page_tables, self._page_size, plan.prompt_rows, plan.arrays, buffer)
        with torch.inference_mode(), self._stream:
            buffer.upload()
            # On a CPU the arrays stay where they are, and are read to the end.
            uploaded = None if self._device.type == "cpu" else self._stream.record()
            launched = self._run_iteration(batch, staged, plan, offload)
        self._ring.release(uploaded or launched.done)
        self._launched.append(launched)

    def call(self, function: Callable[[], object]) -> None:
        """Have a function called on the device's stream, behind what was launched."""
        self._stream.call(function)

    def poll(self) -> IterationOutput:
        """Result of the oldest iteration that was launched and not polled; waits for it.

        Raises:
            RuntimeError: There is none.
            Exception: Whatever the iteration has raised.
        """
        if not self._launched:
            raise RuntimeError("poll was called without a launch; call launch first")
        return self._launched.popleft().collect()

    def drain(self) -> None:
        """Wait for all that was launched, and forget it."""
        self._launched.clear()
        self._stream.synchronize()

    def close(self) -> None:
        """Forget what was launched, and end."""
        self.drain()
        self._stream.close()

    def _run_iteration(
        self,
        batch: Batch,
        staged: StagedBatch,
        plan: SamplingPlan,
        offload: IterationOffload | None,
    ) -> _Launched:
        """Give all work of an iteration to the stream."""
        stream, buffer = self._stream, staged.buffer
        inputs = staged.inputs()
        if staged.has_unknown_tokens:
            self._operations["feed_sampled"](
                token_ids=inputs[BatchInput.TOKEN_IDS],
                slots=buffer.on_device("slot_of_row"),
                last_sampled=self._last_sampled,
            )
        self._operations.prepare(staged.attention(inputs))
        arguments = self._arguments(staged, inputs)
        self._run(self._prologue, arguments, staged)
        for layer, operations in enumerate(self._layers):
            self._call_hooks(self.before_layer, layer, staged)
            self._run_layer(layer, operations, arguments, staged, offload)
            self._call_hooks(self.after_layer, layer, staged)
        self._run(self._epilogue, arguments, staged)
        logits = self._view("logits", Rows.SELECTED, staged)
        num_sampled = len(plan.slots)
        sampled, logprobs = None, None
        if num_sampled:
            sampled, logprobs = self.sampler.sample(logits[:num_sampled], plan, buffer, stream)
            if self._network is not None:  # zero on all ranks but the one that samples
                self._network["all_reduce"](x=sampled, out=sampled)
            self._operations["keep_sampled"](
                sampled=sampled,
                slots=buffer.on_device("sample_slots"),
                last_sampled=self._last_sampled,
            )
            sampled = to_host(sampled)
        prompt_logprobs = self.sampler.prompt_logprobs(plan, logits[num_sampled:], stream)
        return _Launched(batch, sampled, logprobs, prompt_logprobs, stream.record())

    def _call_hooks(self, hooks: list[LayerHook], layer: int, staged: StagedBatch) -> None:
        """Have hooks called in the order of the stream's work."""
        if hooks:
            edges = {name: self._view(name, Rows.ALL, staged) for name in self._edges}
            for hook in hooks:
                self._stream.call(partial(hook, layer, edges))

    def _run(
        self,
        operations: list[_BoundOperation],
        arguments: list[dict[str, Tensor]],
        staged: StagedBatch,
    ) -> None:
        for operation in operations:
            if staged.num_rows(operation.rows):
                operation.function(**operation.fixed, **arguments[operation.signature])

    def _run_layer(
        self,
        layer: int,
        operations: list[_BoundOperation],
        arguments: list[dict[str, Tensor]],
        staged: StagedBatch,
        offload: IterationOffload | None,
    ) -> None:
        """Run a layer; its new K and V go down as soon as they are there, beside what follows."""
        if offload is None:
            self._run(operations, arguments, staged)
            return
        for operation in operations:
            appends = operation.kind == "rope_append"
            if appends:
                self._stream.call(partial(offload.before_append, layer))
            self._run([operation], arguments, staged)
            if appends:
                self._stream.call(partial(offload.after_append, layer))

    def _bind(
        self,
        operations: tuple[Operation, ...],
        weights: dict[str, Tensor],
        caches: tuple[Tensor, Tensor] | None,
    ) -> list[_BoundOperation]:
        bound = []
        for operation in operations:
            fixed: dict[str, Any] = dict(operation.constants)
            fixed |= {name: weights[weight] for name, weight in operation.weights.items()}
            for name, source in operation.inputs.items():
                if source is BatchInput.COS_SIN:
                    fixed[name] = self._cos_sin
                elif caches and source in (BatchInput.K_CACHE, BatchInput.V_CACHE):
                    fixed[name] = caches[source is BatchInput.V_CACHE]
            if operation.kind == "moe_experts":
                fixed["scratch"] = self._scratch
            function = (
                self._network[operation.kind]
                if self._network is not None and operation.category is Category.NETWORK
                else self._operations[operation.kind]
            )
            bound.append(
                _BoundOperation(
                    operation.kind, function, fixed, self._signature(operation), operation.rows
                )
            )
        return bound

    def _signature(self, operation: Operation) -> int:
        """Number of the arguments that change by iteration; operations of all layers share them."""
        for number, known in enumerate(self._signatures):
            if (known.reads, known.writes, known.inputs, known.rows, known.reads_all_rows) == (
                operation.reads,
                operation.writes,
                operation.inputs,
                operation.rows,
                operation.reads_all_rows,
            ):
                return number
        self._signatures.append(operation)
        return len(self._signatures) - 1

    def _arguments(
        self, staged: StagedBatch, inputs: dict[BatchInput, Tensor]
    ) -> list[dict[str, Tensor]]:
        """For each signature, the edges' views and the staged arrays of this iteration."""
        arguments = []
        for operation in self._signatures:
            values = {
                name: self._view(
                    edge, Rows.ALL if edge in operation.reads_all_rows else operation.rows, staged
                )
                for mapping in (operation.reads, operation.writes)
                for name, edge in mapping.items()
            }
            values |= {
                name: inputs[source]
                for name, source in operation.inputs.items()
                if source in inputs
            }
            arguments.append(values)
        return arguments

    def _view(self, name: str, rows: Rows, staged: StagedBatch) -> Tensor:
        """The rows of an edge's buffer that this iteration uses."""
        if name in self._selected_edges:
            count = staged.num_rows(Rows.SELECTED)
            # Prompt logprobs want a row per prompt token, which only some iterations do.
            if count > self._buffers[name].shape[0]:
                self._buffers[name] = self._allocate(self._edges[name], count)
            return self._buffers[name][:count]
        start, end = staged.row_range(rows)
        return self._buffers[name][start:end]

    def _scratch_bytes(
        self, operation: Operation, weights: dict[str, Tensor], max_tokens: int
    ) -> int:
        """Bytes of scratch that an operation of a layer needs for the largest batch."""
        if operation.kind != "moe_experts":
            return 0
        return self._operations.scratch_bytes(
            operation.kind,
            tokens=max_tokens,
            experts_per_token=self._edges[operation.reads["expert_ids"]].width,
            **{name: weights[operation.weights[name]] for name in ("gate_up", "down")},
        )

    def _allocate(self, edge: Edge, rows: int) -> Tensor:
        dtype = _ELEMENTS.get(edge.element, self._dtype)
        return torch.empty(rows, edge.width, dtype=dtype, device=self._device)
