"""What the nano-operations of an iteration ask of a device. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from nf_kernels import cost
from nf_kernels.cost import Cost
from nf_runtime.graph import LayerGraph, Operation, Rows
from nf_runtime.pipeline.division import Division
from nf_runtime.pipeline.schedule import Node, Schedule, operation_of


class NodeCosts:
    """Costs of nano-operations, from the graph's own sizes (of a rank's shard, where it is one).

    Args:
        graph: The model.
        head_dim: Elements of a head.
        element_bytes: Of activations, weights and KV.
        experts: Of a mixture, here.
        expert_features: Elements between the two products of one, here.
        ranks: That share the model.
    """

    def __init__(
        self,
        graph: LayerGraph,
        *,
        head_dim: int,
        element_bytes: int,
        experts: int = 0,
        expert_features: int = 0,
        ranks: int = 1,
    ) -> None:
        self._graph = graph
        self._element = element_bytes
        self._experts = experts
        self._expert_features = expert_features
        self._ranks = ranks
        heads = graph.edges["query"].width // head_dim
        kv_heads = (graph.edges["qkv"].width // head_dim - heads) // 2
        self._heads: dict[str, Any] = {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "element_bytes": element_bytes,
        }
        self._of_kind: dict[str, Callable[[Operation, int], Cost]] = {
            "embedding": self._rows_of_out,
            "gather_rows": self._rows_of_out,
            "rms_norm": self._rms_norm,
            "linear": self._linear,
            "rope_append": self._rope_append,
            "swiglu": self._swiglu,
            "moe_route": self._moe_route,
            "moe_experts": self._moe_experts,
            "all_reduce": self._all_reduce,
            "all_gather": self._all_gather,
        }

    def total(self, schedule: Schedule, division: Division, contexts: np.ndarray) -> Cost:
        """Of an iteration.

        Args:
            schedule: Of its plan.
            division: Of its batch.
            contexts: int [requests], tokens of each before the batch.
        """
        result = Cost(0, 0, 0)
        known: dict[tuple[float, ...], Cost] = {}  # most layers are alike
        for number, (part, index, first, end, _) in enumerate(schedule.nodes.tolist()):
            window = operation_of(schedule.graph, part, index).constants.get("window", 0)
            key = schedule.signature(part, index), window, first, end
            if key not in known:
                known[key] = self.of(schedule.node(number), division, contexts)
            result += known[key]
        return result

    def of(self, node: Node, division: Division, contexts: np.ndarray) -> Cost:
        """Of a nano-operation; an operation that moves rows about in memory alone costs nothing."""
        operation = node.operation
        if operation.kind == "decode_attention":
            first, end = division.rows(Rows.DECODE, node.first, node.end)
            seq_lens = (contexts[first:end] + 1).tolist()
            return cost.decode_attention(seq_lens=seq_lens, **self._heads, **_window(operation))
        if operation.kind == "prefill_attention":
            sequences = self._sequences(node, division, contexts)
            return cost.prefill_attention(sequences=sequences, **self._heads, **_window(operation))
        rows = (
            division.num_selected
            if operation.rows is Rows.SELECTED
            else int(np.subtract(*division.rows(operation.rows, node.first, node.end)[::-1]))
        )
        of_kind = self._of_kind.get(operation.kind)
        return of_kind(operation, rows) if of_kind and rows else Cost(0, 0, 0)

    def _sequences(
        self, node: Node, division: Division, contexts: np.ndarray
    ) -> list[tuple[int, int]]:
        """Queries and tokens in pages of each segment."""
        first, end = division.requests(Rows.PREFILL, node.first, node.end)
        starts = division.segment_start.tolist()
        begins: dict[int, int] = {}
        for segment, request in enumerate(division.segment_request.tolist()):
            begins.setdefault(request, starts[segment])
        found = []
        for segment, (start, stop) in enumerate(pairwise(starts)):
            if first <= segment < end:
                request = int(division.segment_request[segment])
                context = int(contexts[division.num_decodes + request])
                found.append((stop - start, context + stop - begins[request]))
        return found

    def _width(self, edge: str) -> int:
        return self._graph.edges[edge].width

    def _rows_of_out(self, operation: Operation, rows: int) -> Cost:
        function = cost.embedding if operation.kind == "embedding" else cost.gather_rows
        features = self._width(operation.writes["out"])
        return function(rows=rows, features=features, element_bytes=self._element)

    def _rms_norm(self, operation: Operation, rows: int) -> Cost:
        return cost.rms_norm(
            rows=rows,
            features=self._width(operation.writes["out"]),
            element_bytes=self._element,
            residual="residual" in operation.reads,
        )

    def _linear(self, operation: Operation, rows: int) -> Cost:
        return cost.linear(
            rows=rows,
            in_features=self._width(operation.reads["x"]),
            out_features=self._width(operation.writes["out"]),
            element_bytes=self._element,
            bias="bias" in operation.weights,
            residual="residual" in operation.reads,
        )

    def _rope_append(self, operation: Operation, rows: int) -> Cost:
        return cost.rope_append(rows=rows, qk_norm="q_norm" in operation.weights, **self._heads)

    def _swiglu(self, operation: Operation, rows: int) -> Cost:
        features = self._width(operation.writes["out"])
        return cost.swiglu(rows=rows, features=features, element_bytes=self._element)

    def _moe_route(self, operation: Operation, rows: int) -> Cost:
        return cost.moe_route(
            rows=rows,
            experts=self._width(operation.reads["router_logits"]),
            experts_per_token=self._width(operation.writes["expert_ids"]),
            element_bytes=self._element,
        )

    def _moe_experts(self, operation: Operation, rows: int) -> Cost:
        per_token = self._width(operation.reads["expert_ids"])
        return cost.moe_experts(
            rows=rows,
            features=self._width(operation.writes["out"]),
            expert_features=self._expert_features,
            experts_per_token=per_token,
            # Which experts a batch needs is on the device; this many at most.
            experts_touched=max(per_token, min(self._experts, rows * per_token)),
            element_bytes=self._element,
        )

    def _all_reduce(self, operation: Operation, rows: int) -> Cost:
        elements = rows * self._width(next(iter(operation.writes.values())))
        return cost.all_reduce(elements=elements, element_bytes=self._element, ranks=self._ranks)

    def _all_gather(self, operation: Operation, rows: int) -> Cost:
        elements = rows * self._width(next(iter(operation.writes.values())))
        return cost.all_gather(elements=elements, element_bytes=self._element, ranks=self._ranks)


def _window(operation: Operation) -> dict[str, Any]:
    return {"window": operation.constants.get("window", 0)}
