"""What a plan is compiled to: a flat list of launches, waits and signals per lane. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from nf_kernels.cost import CATEGORIES, Category
from nf_runtime.graph import BatchInput, LayerGraph, Operation, Rows
from nf_runtime.pipeline.plan import Plan
from nf_runtime.pipeline.workspace import Layout

_CACHES = frozenset({BatchInput.K_CACHE, BatchInput.V_CACHE})

BEFORE_APPEND = Operation("before_append", "notice", updates=_CACHES)
"""Tells the KV cache that K and V of a layer are about to be written."""

AFTER_APPEND = Operation("after_append", "notice")
"""Tells it that they were, for all tokens of the iteration."""


BEFORE, AFTER = -1, -2
"""What stands for these two where an operation's number in its part would."""

_NOTICES = {BEFORE: BEFORE_APPEND, AFTER: AFTER_APPEND}


def operation_of(graph: LayerGraph, part: int, index: int) -> Operation:
    """An operation by its number in a part of the graph, or a notice."""
    return _NOTICES[index] if index < 0 else graph.parts[part][index]


class Code(IntEnum):
    """What a lane is told."""

    LAUNCH = 0  # run the nano-operation of this number
    WAIT = 1  # until the event of this number was signalled
    SIGNAL = 2  # that event


@dataclass(frozen=True, slots=True)
class Node:
    """A nano-operation of an iteration.

    Attributes:
        layer: Number of its layer; -1 before the first, the number of layers after the last.
        operation: What it runs.
        first: Its first nano-batch.
        end: The one behind its last.
        lane: Number of its lane.
        implementation: As in the plan.
    """

    layer: int
    operation: Operation
    first: int
    end: int
    lane: int
    implementation: str | None

    @property
    def category(self) -> Category:
        """The resource that it saturates."""
        return CATEGORIES.get(self.operation.kind, Category.MEMORY)

    def __str__(self) -> str:
        last = self.end - 1
        batches = f"{self.first}" if last == self.first else f"{self.first} to {last}"
        return f"{self.operation.name} of layer {self.layer}, nano-batch {batches}"


@dataclass(frozen=True)
class Schedule:
    """One iteration, for any batch of one structure.

    Each lane runs its commands in order. All lanes begin when the one before has ended, and an
    iteration has ended when all lanes have.

    Attributes:
        plan: What it was compiled from.
        graph: Likewise.
        nodes: int32 [N, 5], for each nano-operation: part of the graph (0 before the layers, layer
            + 1, after them the number of layers + 1), number in that part (of a notice, `BEFORE`
            or `AFTER`), first nano-batch, the one behind the last, lane.
        placed: int32 [N], number in `plan.operations`; -1 for what the plan does not list.
        commands: Per lane (`Plan.lane_names`) int32 [n, 2]: a `Code`, and the number of a
            nano-operation or of an event.
        num_events: Events are counted from 0.
        layout: How the rows of edges lie in the workspace.
    """

    plan: Plan
    graph: LayerGraph
    nodes: np.ndarray
    placed: np.ndarray
    commands: tuple[np.ndarray, ...]
    num_events: int
    layout: Layout = Layout.BY_TOKEN

    def node(self, number: int) -> Node:
        """A nano-operation, to look at."""
        part, index, first, end, lane = self.nodes[number].tolist()
        placed = int(self.placed[number])
        return Node(
            part - 1,
            operation_of(self.graph, part, index),
            first,
            end,
            lane,
            self.plan.operations[placed].implementation if placed >= 0 else None,
        )

    @cached_property
    def attention(self) -> tuple[tuple[Rows, int, int], ...]:
        """Token range, first nano-batch and the one behind the last of all attention."""
        found = {}
        for number in range(len(self.nodes)):
            node = self.node(number)
            if node.operation.kind.endswith("_attention"):
                found[node.operation.rows, node.first, node.end] = True
        return tuple(found)

    def signature(self, part: int, index: int) -> int:
        """The same number for operations that differ in weights, constants and K and V alone."""
        return self._signatures[part][index] if index >= 0 else index

    @cached_property
    def _signatures(self) -> list[list[int]]:
        known: list[Operation] = []
        signatures: list[list[int]] = []
        for part in self.graph.parts:
            signatures.append([])
            for operation in part:
                alike = (i for i, other in enumerate(known) if _are_alike(operation, other))
                number = next(alike, len(known))
                if number == len(known):
                    known.append(operation)
                signatures[-1].append(number)
        return signatures

    @cached_property
    def launch_order(self) -> list[tuple[int, Code, int]]:
        """Lane, code and argument of all commands, in an order in which no wait has to wait."""
        order: list[tuple[int, Code, int]] = []
        lists = [commands.tolist() for commands in self.commands]
        nexts = [0] * len(lists)
        signalled: set[int] = set()
        remaining = sum(map(len, lists))
        while len(order) < remaining:
            before = len(order)
            for lane, commands in enumerate(lists):
                while nexts[lane] < len(commands):
                    code, argument = commands[nexts[lane]]
                    if code == Code.WAIT and argument not in signalled:
                        break
                    if code == Code.SIGNAL:
                        signalled.add(argument)
                    order.append((lane, Code(code), argument))
                    nexts[lane] += 1
            if len(order) == before:
                raise RuntimeError("the lanes of the schedule wait for each other")
        return order


def _are_alike(a: Operation, b: Operation) -> bool:
    """Whether two operations take the same rows of the same edges and parts of the batch."""
    return a is b or (
        (a.reads, a.writes, a.inputs, a.rows, a.reads_all_rows)
        == (b.reads, b.writes, b.inputs, b.rows, b.reads_all_rows)
    )
