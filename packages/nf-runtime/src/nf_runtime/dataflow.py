"""Who reads what whom has written, over all layers of a graph. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass

from nf_runtime.graph import BatchInput, LayerGraph, Operation, Rows


@dataclass(frozen=True, slots=True)
class Step:
    """An operation at its place in a model.

    Attributes:
        layer: Number of its layer; -1 before the first, the number of layers after the last.
        operation: What it is.
    """

    layer: int
    operation: Operation


@dataclass(frozen=True, slots=True)
class Flow:
    """An operation reads what another one has written in the same iteration.

    Attributes:
        source: Who writes.
        target: Who reads.
        data: The edge, or the part of the KV cache.
    """

    source: Step
    target: Step
    data: str


def steps(graph: LayerGraph) -> Iterator[Step]:
    """All operations, in an order that respects what they read."""
    parts = (graph.prologue, *graph.layers, graph.epilogue)
    for layer, part in enumerate(parts, start=-1):
        for operation in part:
            yield Step(layer, operation)


def flows(graph: LayerGraph) -> list[Flow]:
    """Every flow of data between two operations, those to the next layer included.

    A reader takes rows from the last operation that wrote each of them: what decodes and prefills
    write to one edge comes from two. K and V of a layer flow to its own attention.
    """
    last: dict[tuple[str, Rows], Step] = {}  # who has written a part of the rows
    result = []
    for step in steps(graph):
        for data, rows in _reads(step.operation):
            places = [(_place(step, data), part) for part in rows.parts]
            writers = {id(last[place]): last[place] for place in places if place in last}
            result += [Flow(writer, step, data) for writer in writers.values()]
        for data, rows in _writes(step.operation):
            last |= {(_place(step, data), part): step for part in rows.parts}
    return result


_CACHES = (BatchInput.K_CACHE, BatchInput.V_CACHE)


def _reads(operation: Operation) -> list[tuple[str, Rows]]:
    """What an operation reads, and which rows of it."""
    reads = [
        (edge, Rows.ALL if edge in operation.reads_all_rows else operation.rows)
        for edge in dict.fromkeys(operation.reads.values())
    ]
    return reads + [
        (part.value, Rows.ALL)
        for part in operation.inputs.values()
        if part in _CACHES and part not in operation.updates
    ]


def _writes(operation: Operation) -> list[tuple[str, Rows]]:
    """What an operation writes, and which rows of it."""
    writes = [(edge, operation.rows) for edge in operation.writes.values()]
    return writes + [(part.value, Rows.ALL) for part in sorted(operation.updates)]


def _place(step: Step, data: str) -> str:
    """Edges are those of every layer; each layer has K and V of its own."""
    return f"{data} {step.layer}" if data in _CACHES else data
