"""The plans that ship. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import MappingProxyType

from nf_kernels.cost import Category
from nf_runtime.graph import LayerGraph, Operation
from nf_runtime.pipeline.plan import (
    WHOLE_DEVICE,
    Lane,
    NanoBatch,
    NanoOperation,
    Partition,
    Phase,
    Plan,
    PlanError,
)


def sequential(graph: LayerGraph) -> Plan:
    """One operation after the other, on the whole batch and the whole device."""
    return Plan(
        name="sequential",
        nano_batches=(NanoBatch(),),
        operations=_on(WHOLE_DEVICE, _operations(graph), (0,)),
    )


def nanoflow(graph: LayerGraph) -> Plan:
    """Two nano-batches: attention of one beside the products of the other (NanoFlow, section 4).

    While the decodes of the first nano-batch read their keys and values, the second one's products
    of the layer before run, and the other way round; collectives have a lane of their own.
    """
    return _nanoflow(graph, "nanoflow", ((0,), (1,)))


def nanoflow4(graph: LayerGraph) -> Plan:
    """As `nanoflow`, with the products of Q, K and V and the attention in four nano-batches."""
    return _nanoflow(graph, "nanoflow-4", ((0, 1), (2, 3)))


def pd_multiplex(graph: LayerGraph) -> Plan:
    """Decodes and prefills on lanes of their own, through all layers."""
    operations = _operations(graph)
    return Plan(
        name="pd-multiplex",
        nano_batches=(NanoBatch(phase=Phase.DECODE), NanoBatch(phase=Phase.PREFILL)),
        lanes=(Lane(name="decode", share=0.5), Lane(name="prefill", share=0.5)),
        operations=(*_on("decode", operations, (0,)), *_on("prefill", operations, (1,))),
    )


def two_batch(graph: LayerGraph) -> Plan:
    """Two nano-batches: collectives of one beside all else of the other.

    Raises:
        PlanError: The model has no collectives.
    """
    operations = _operations(graph)
    if not any(operation.category is Category.NETWORK for operation in operations):
        raise PlanError(
            "plan 'two-batch' overlaps collectives with the rest, and one rank has none; "
            "set tensor_parallel_size to 2 or more, or choose another plan"
        )
    listed: list[NanoOperation] = []
    for segment in _segments(operations):
        for nano_batch in ((0,), (1,)):
            listed += _by_category(segment, nano_batch, compute="compute", network="network")
    return Plan(
        name="two-batch",
        nano_batches=(NanoBatch(share=0.5), NanoBatch(share=0.5)),
        lanes=(Lane(name="compute", share=1.0), Lane(name="network", share=1.0)),
        partition=Partition.SHARED,
        operations=tuple(listed),
    )


def co_resident(graph: LayerGraph) -> Plan:
    """Two nano-batches beside each other, each with all units: the device divides them."""
    operations = _operations(graph)
    return Plan(
        name="co-resident",
        nano_batches=(NanoBatch(share=0.5), NanoBatch(share=0.5)),
        lanes=(Lane(name="first", share=1.0), Lane(name="second", share=1.0)),
        partition=Partition.SHARED,
        operations=(*_on("first", operations, (0,)), *_on("second", operations, (1,))),
    )


TEMPLATES = MappingProxyType(
    {
        "sequential": sequential,
        "nanoflow": nanoflow,
        "nanoflow-4": nanoflow4,
        "pd-multiplex": pd_multiplex,
        "two-batch": two_batch,
        "co-resident": co_resident,
    }
)
"""What makes a plan of each name for a graph."""

Template = Callable[[LayerGraph], Plan]


def _nanoflow(graph: LayerGraph, name: str, halves: Sequence[tuple[int, ...]]) -> Plan:
    """The overlap of attention, products and collectives.

    Args:
        graph: The model.
        name: Of the plan.
        halves: Nano-batches of each half of the batch. Up to attention each nano-batch has
            operations of its own; behind it each half has.
    """
    operations = _operations(graph)
    last = max(i for i, o in enumerate(operations) if o.kind.endswith("_attention"))
    before = [o for o in operations[: last + 1] if o.kind != "decode_attention"]
    attention = [o for o in operations[: last + 1] if o.kind == "decode_attention"]
    behind = operations[last + 1 :]
    networked = any(operation.category is Category.NETWORK for operation in operations)
    network = "network" if networked else "compute"

    def first(numbers: Iterable[int]) -> list[NanoOperation]:
        return [
            listed
            for number in numbers
            for listed in (
                *_by_category(before, (number,), compute="compute", network=network),
                *_on("memory", attention, (number,)),
            )
        ]

    def second(half: tuple[int, ...], layers_behind: int) -> list[NanoOperation]:
        return _by_category(
            behind, half, compute="compute", network=network, layers_behind=layers_behind
        )

    front, rear = halves
    lanes = [Lane(name="compute", share=0.6), Lane(name="memory", share=0.4)]
    if networked:
        lanes.append(Lane(name="network", share=0.1))
    return Plan(
        name=name,
        nano_batches=tuple(NanoBatch(share=1 / len((*front, *rear))) for _ in (*front, *rear)),
        lanes=tuple(lanes),
        operations=(*first(front), *second(rear, 1), *first(rear), *second(front, 0)),
    )


def _operations(graph: LayerGraph) -> list[Operation]:
    """One operation of each name that a layer has, in an order that respects every layer's."""
    merged: list[Operation] = []
    for layer in dict.fromkeys(tuple(operation.name for operation in ops) for ops in graph.layers):
        known = [operation.name for operation in merged]
        by_name = {o.name: o for ops in graph.layers for o in ops}
        place = 0
        for name in layer:
            if name in known:
                place = [operation.name for operation in merged].index(name) + 1
            else:
                merged.insert(place, by_name[name])
                place += 1
    return merged


def _segments(operations: Sequence[Operation]) -> list[list[Operation]]:
    """The operations up to each collective, that one included, and what follows the last."""
    segments: list[list[Operation]] = [[]]
    for operation in operations:
        segments[-1].append(operation)
        if operation.category is Category.NETWORK:
            segments.append([])
    return [segment for segment in segments if segment]


def _on(
    lane: str, operations: Iterable[Operation], nano_batches: tuple[int, ...]
) -> tuple[NanoOperation, ...]:
    return tuple(
        NanoOperation(operation=operation.name, nano_batches=nano_batches, lane=lane)
        for operation in operations
    )


def _by_category(
    operations: Iterable[Operation],
    nano_batches: tuple[int, ...],
    *,
    compute: str,
    network: str,
    layers_behind: int = 0,
) -> list[NanoOperation]:
    """Collectives on one lane, all else on the other."""
    return [
        NanoOperation(
            operation=operation.name,
            nano_batches=nano_batches,
            lane=network if operation.category is Category.NETWORK else compute,
            layers_behind=layers_behind,
        )
        for operation in operations
    ]
