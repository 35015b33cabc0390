"""A graph with its weights, caches and activations: what remains to be said is which rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nf_kernels.ops import OperationSet
from nf_runtime.activations import Activations
from nf_runtime.graph import BatchInput, LayerGraph, Operation
from nf_runtime.pipeline.plan import PlanError
from nf_runtime.staged_batch import StagedBatch
from nf_runtime.weights import ModelWeights


@dataclass(frozen=True, slots=True)
class BoundOperation:
    """An operation at its place in the model.

    Attributes:
        operation: What it is.
        fixed: Its arguments that are the same in every iteration.
    """

    operation: Operation
    fixed: dict[str, Any]


class BoundGraph:
    """All operations of a model on one device.

    Args:
        graph: The model.
        weights: Its weights.
        kv_layers: K and V of each layer, [pages, heads, page_size, head_dim].
        operations: Implementation of every operation.
        activations: Where edges are.
        cos_sin: float32 [positions, head_dim].
        collectives: Implementation of every collective, by kind.
        max_tokens: Of one iteration.

    Attributes:
        graph: See above.
        activations: See above.
    """

    def __init__(
        self,
        graph: LayerGraph,
        weights: ModelWeights,
        kv_layers: Sequence[tuple[Tensor, Tensor]],
        operations: OperationSet,
        activations: Activations,
        *,
        cos_sin: Tensor,
        collectives: Mapping[str, Callable[..., None]],
        max_tokens: int,
    ) -> None:
        self.graph = graph
        self.activations = activations
        self._operations = operations
        self._collectives = collectives
        self._cos_sin = cos_sin
        groups = (weights.model, *weights.layers, weights.model)
        caches = (None, *kv_layers, None)
        self._parts = [
            [self._bind(operation, group, cache) for operation in part]
            for part, group, cache in zip(graph.parts, groups, caches, strict=True)
        ]
        self._scratch: dict[int, Tensor] = {}
        self._scratch_bytes = self._most_scratch(max_tokens)

    def at(self, part: int, index: int) -> BoundOperation:
        """An operation by its place (`Schedule.nodes`)."""
        return self._parts[part][index]

    def function(self, operation: Operation, implementation: str | None) -> Callable[..., None]:
        """What computes an operation.

        Raises:
            PlanError: There is no such implementation.
        """
        found: dict[str | None, Callable[..., None]]
        if operation.kind in self._collectives:
            found = {None: self._collectives[operation.kind]}
        else:
            found = {None: self._operations[operation.kind]}
            found.update(self._operations.implementations(operation.kind))
        if implementation not in found:
            named = ", ".join(sorted(name for name in found if name)) or "none by name"
            raise PlanError(
                f"operation {operation.name!r} has no implementation {implementation!r} here; "
                f"there is {named}"
            )
        return found[implementation]

    def views(
        self,
        operation: Operation,
        rows: tuple[int, int],
        requests: tuple[int, int],
        staged: StagedBatch,
    ) -> dict[str, Tensor]:
        """The arguments of one iteration: rows of edges, and parts of the batch.

        Args:
            operation: Any of the graph's.
            rows: First row and end.
            requests: First request, or segment, and end; for attention.
            staged: The batch, on the device.
        """
        values = {}
        for mapping in (operation.reads, operation.writes):
            for name, edge in mapping.items():
                whole = edge in operation.reads_all_rows and mapping is operation.reads
                first, end = (0, staged.num_tokens) if whole else rows
                values[name] = self.activations.rows(edge, first, end, staged.layout)
        for name, source in operation.inputs.items():
            if source not in _FIXED_INPUTS:
                values[name] = staged.input(source, rows, requests)
        return values

    def edges(self, staged: StagedBatch) -> dict[str, Tensor]:
        """The batch's rows of every edge. Edges share memory: not all hold what was in them."""
        selected = self.graph.selected_edges
        return {
            name: self.activations.rows(
                name,
                0,
                staged.num_selected if name in selected else staged.num_tokens,
                staged.layout,
            )
            for name in self.graph.edges
        }

    def reserve_scratch(self, lanes: Collection[int]) -> bool:
        """Have scratch for these lanes, and for no others; whether that of another was given up.

        What was given to the device with it keeps it until it is done; what is recorded with it,
        as long as it is recorded.

        Args:
            lanes: Numbers of all on which operations run that take scratch.
        """
        for lane in lanes:
            self._scratch_of(lane)
        spare = self._scratch.keys() - set(lanes)
        for lane in spare:
            del self._scratch[lane]
        return bool(spare)

    def scratch(self, operation: Operation, lane: int) -> dict[str, Tensor]:
        """The scratch that an operation takes, if it takes any.

        Each lane has its own, in which it runs one operation after the other.
        """
        if operation.kind != "moe_experts":
            return {}
        return {"scratch": self._scratch_of(lane)}

    @property
    def num_bytes(self) -> int:
        """Of all scratch and the table of RoPE."""
        return sum(s.nbytes for s in self._scratch.values()) + self._cos_sin.nbytes

    def _scratch_of(self, lane: int) -> Tensor:
        """That of a lane; made here for plans alone of which nobody was told before."""
        if lane not in self._scratch:
            self._scratch[lane] = torch.empty(
                self._scratch_bytes, dtype=torch.uint8, device=self._cos_sin.device
            )
        return self._scratch[lane]

    def _most_scratch(self, max_tokens: int) -> int:
        """Bytes of scratch that an operation needs for the largest batch."""
        return max(
            (
                self._operations.scratch_bytes(
                    bound.operation.kind,
                    tokens=max_tokens,
                    experts_per_token=self.graph.edges[bound.operation.reads["expert_ids"]].width,
                    **{name: bound.fixed[name] for name in ("gate_up", "down")},
                )
                for part in self._parts
                for bound in part
                if bound.operation.kind == "moe_experts"
            ),
            default=0,
        )

    def _bind(
        self,
        operation: Operation,
        weights: dict[str, Tensor],
        caches: tuple[Tensor, Tensor] | None,
    ) -> BoundOperation:
        fixed: dict[str, Any] = dict(operation.constants)
        fixed |= {name: weights[weight] for name, weight in operation.weights.items()}
        for name, source in operation.inputs.items():
            if source is BatchInput.COS_SIN:
                fixed[name] = self._cos_sin
            elif caches and source in _FIXED_INPUTS:
                fixed[name] = caches[source is BatchInput.V_CACHE]
        return BoundOperation(operation, fixed)


_FIXED_INPUTS = frozenset({BatchInput.COS_SIN, BatchInput.K_CACHE, BatchInput.V_CACHE})
