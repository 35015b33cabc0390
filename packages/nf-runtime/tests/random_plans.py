"""Random legal plans and random batches, however they are run then.

A plan is drawn so that it is legal, and never thrown away: going through its list once per tile,
one nano-operation after the other, respects what each depends on. Lanes only relax that order.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from nf_runtime.graph import LayerGraph, Operation
from nf_runtime.pipeline.plan import (
    WHOLE_DEVICE,
    Lane,
    NanoBatch,
    NanoOperation,
    Partition,
    Phase,
    Plan,
)

_LANES = ("first", "second", "third")
_SHARES = st.sampled_from((0.05, 0.2, 1 / 3, 0.5, 0.9, 1.0))


@dataclass(frozen=True)
class RandomBatch:
    """What a division and a check of races are told of a batch.

    Attributes:
        num_decodes: Requests with one token each.
        prefills: int64 [P], new tokens of the others.
        contexts: int64 [num_decodes + P], tokens of each request before.
        selected: Rows whose logits are wanted.
    """

    num_decodes: int
    prefills: np.ndarray
    contexts: np.ndarray
    selected: int

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + int(self.prefills.sum())


@st.composite
def batches(
    draw: st.DrawFn,
    max_decodes: int = 6,
    max_prefills: int = 4,
    max_chunk: int = 40,
    max_context: int = 30,
) -> RandomBatch:
    """Batches of at least one token; a decode has a token in the cache before it."""
    num_decodes = draw(st.integers(0, max_decodes))
    chunks = st.lists(
        st.one_of(st.integers(1, 5), st.integers(1, max_chunk)),
        min_size=num_decodes == 0,
        max_size=max_prefills,
    )
    prefills = draw(chunks)
    before = [draw(st.integers(1, max_context)) for _ in range(num_decodes)]
    before += [draw(st.just(0) | st.integers(0, max_context)) for _ in prefills]
    selected = draw(st.sampled_from((num_decodes + len(prefills), 0)))
    return RandomBatch(
        num_decodes,
        np.array(prefills, dtype=np.int64),
        np.array(before, dtype=np.int64),
        selected,
    )


@dataclass(eq=False)
class _Listed:
    """A nano-operation that has no place in the list yet."""

    operation: Operation
    first: int
    end: int
    layers_behind: int = 0

    def overlaps(self, other: "_Listed") -> bool:
        """Whether both work on rows of one nano-batch."""
        parts = set(self.operation.rows.parts) & set(other.operation.rows.parts)
        return bool(parts) and self.first < other.end and other.first < self.end

    def attends_to(self, other: "_Listed") -> bool:
        """Whether this may attend to keys that the other appends, of a request cut in two."""
        attends = self.operation.kind == "prefill_attention" and other.operation.updates
        return bool(attends) and other.first < self.end


@st.composite
def legal_plans(draw: st.DrawFn, graph: LayerGraph, max_nano_batches: int = 4) -> Plan:
    """Plans for a graph whose layers all list what they have in common in one order."""
    nano_batches = draw(_nano_batches(max_nano_batches))
    num_lanes = draw(st.sampled_from((2, 3, 1, 0)))
    lanes = tuple(Lane(name=name, share=draw(_SHARES)) for name in _LANES[:num_lanes])
    listed = draw(_listed(graph, len(nano_batches)))
    befores = _befores(graph, listed)
    _put_behind(draw, listed, befores, len(nano_batches))
    order = _linear_extension(draw, listed, befores)
    names = [f"{one.operation.name}:{one.first}" for one in order]
    # The lane of the whole device is rarely one of several.
    choice = st.sampled_from((*_LANES[:num_lanes] * 2, WHOLE_DEVICE))
    operations = tuple(
        NanoOperation(
            operation=one.operation.name,
            nano_batches=tuple(range(one.first, one.end)),
            lane=draw(choice),
            layers_behind=one.layers_behind,
            after_start=_some_of(draw, names[:place]),
        )
        for place, one in enumerate(order)
    )
    return Plan(
        name="random",
        nano_batches=nano_batches,
        lanes=lanes,
        partition=draw(st.sampled_from(Partition)),
        operations=operations,
    )


@st.composite
def _nano_batches(draw: st.DrawFn, most: int) -> tuple[NanoBatch, ...]:
    count = draw(st.sampled_from((2, *range(1, most + 1))))
    decodes = draw(st.integers(0, count - 1)) if count > 1 else 0
    phases = [Phase.ALL] * count
    if decodes:
        phases = [Phase.DECODE] * decodes + [Phase.PREFILL] * (count - decodes)
    return tuple(NanoBatch(share=draw(_SHARES), phase=phase) for phase in phases)


@st.composite
def _listed(draw: st.DrawFn, graph: LayerGraph, count: int) -> list[_Listed]:
    """Every operation of the layers, each with its own grouping of the nano-batches."""
    operations = {operation.name: operation for layer in graph.layers for operation in layer}
    listed = []
    for operation in operations.values():
        cuts = [i for i in range(1, count) if draw(st.booleans())]
        bounds = [0, *cuts, count]
        listed += [_Listed(operation, first, end) for first, end in itertools.pairwise(bounds)]
    return listed


def _befores(graph: LayerGraph, listed: Sequence[_Listed]) -> dict[_Listed, list[_Listed]]:
    """For each, those that it comes after within a layer."""
    pairs = {
        (first.name, second.name)
        for layer in graph.layers
        for i, second in enumerate(layer)
        for first in layer[:i]
    }
    return {
        one: [
            other
            for other in listed
            if (other.operation.name, one.operation.name) in pairs
            and (one.overlaps(other) or one.attends_to(other))
        ]
        for one in listed
    }


def _put_behind(
    draw: st.DrawFn,
    listed: Sequence[_Listed],
    befores: dict[_Listed, list[_Listed]],
    count: int,
) -> None:
    """Let the last operations of some nano-batches run a layer behind, and what comes after."""
    names = list(dict.fromkeys(one.operation.name for one in listed))
    cut = [draw(st.just(len(names)) | st.integers(1, len(names))) for _ in range(count)]
    settled: set[_Listed] = set()

    def settle(one: _Listed) -> None:
        if one in settled:
            return
        settled.add(one)
        for other in befores[one]:
            settle(other)
        place = names.index(one.operation.name)
        wanted = any(place >= cut[i] for i in range(one.first, one.end))
        inherited = any(other.layers_behind for other in befores[one])
        one.layers_behind = int(wanted or inherited)

    for one in listed:
        settle(one)


def _linear_extension(
    draw: st.DrawFn, listed: Sequence[_Listed], befores: dict[_Listed, list[_Listed]]
) -> list[_Listed]:
    """An order in which what runs a layer behind comes before what then needs it."""
    missing = {
        one: {other for other in befores[one] if other.layers_behind == one.layers_behind}
        | {o for o in listed if o.layers_behind > one.layers_behind and o.overlaps(one)}
        for one in listed
    }
    rank = dict(zip(listed, draw(st.permutations(range(len(listed)))), strict=True))
    order: list[_Listed] = []
    while missing:
        chosen = min((one for one in missing if not missing[one]), key=rank.__getitem__)
        order.append(chosen)
        del missing[chosen]
        for others in missing.values():
            others.discard(chosen)
    return order


def _some_of(draw: st.DrawFn, names: Sequence[str]) -> tuple[str, ...]:
    """Mostly none."""
    if not names or draw(st.integers(0, 7)) < 6:
        return ()
    return tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)))
