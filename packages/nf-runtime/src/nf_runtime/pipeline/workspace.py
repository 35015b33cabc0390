"""Where activations are: one workspace, planned by how long each edge is needed. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from nf_runtime.graph import Edge, ElementType, LayerGraph, Operation, Rows

_ALIGNMENT = 64  # bytes: what the widest loads want, and a cache line
_PAGE = 4096  # rows so far apart fall into the same lines of a cache


class Layout(StrEnum):
    """How the rows of a buffer's edges lie in it. Both need the same memory."""

    # A token's row holds all its edges side by side. So rows of different nano-batches never
    # overlap, whatever runs beside what.
    BY_TOKEN = "by_token"
    # Each edge has its rows without gaps, which is what kernels read fastest. So where edges take
    # turns in the same memory, rows of one lie where other rows of another were.
    BY_EDGE = "by_edge"


@dataclass(frozen=True, slots=True)
class Buffer:
    """Rows of bytes that edges share.

    Attributes:
        row_bytes: Of a row.
        selected: Whether it has rows only where logits are wanted; else one for each token.
    """

    row_bytes: int
    selected: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where an edge is.

    Attributes:
        buffer: Number of its buffer.
        offset: Of its columns in each row, in bytes.
        num_bytes: Of its columns.
    """

    buffer: int
    offset: int
    num_bytes: int

    def overlaps(self, other: Place) -> bool:
        """Whether the two share memory in each row."""
        return (
            self.buffer == other.buffer
            and self.offset < other.offset + other.num_bytes
            and other.offset < self.offset + self.num_bytes
        )


@dataclass(frozen=True)
class Workspace:
    """The memory of all edges.

    Edges that are not needed at the same time share columns. By either `Layout`, every view of an
    edge is a range of rows of equal distance.

    Attributes:
        buffers: By number.
        places: Of each edge, by its name.
    """

    buffers: tuple[Buffer, ...]
    places: Mapping[str, Place]

    def num_bytes(self, *, tokens: int, selected: int) -> int:
        """Of a workspace for so many tokens, and so many rows whose logits are wanted."""
        return sum(
            buffer.row_bytes * (selected if buffer.selected else tokens) for buffer in self.buffers
        )

    def sharing(self) -> dict[str, tuple[str, ...]]:
        """For each edge, the edges that share memory with it, itself included."""
        return {
            name: tuple(other for other, there in self.places.items() if place.overlaps(there))
            for name, place in self.places.items()
        }


def plan_workspace(graph: LayerGraph, element_bytes: int) -> Workspace:
    """Give every edge its place.

    Args:
        graph: The model.
        element_bytes: Of an element of the model's dtype.
    """
    lives = _lives(graph)
    selected_edges = graph.selected_edges
    buffers: list[Buffer] = []
    places: dict[str, Place] = {}
    for selected in (False, True):
        edges = [edge for edge in graph.edges.values() if (edge.name in selected_edges) == selected]
        alone = [edge for edge in edges if edge.contiguous]
        together = [edge for edge in edges if not edge.contiguous]
        for edge in alone:
            # Rows without gaps: only edges of the same width can take turns in such a buffer.
            size = _bytes(edge, element_bytes)
            taken = [
                (number, [other for other, place in places.items() if place.buffer == number])
                for number, buffer in enumerate(buffers)
                if buffer == Buffer(size, selected)
            ]
            free = [
                number
                for number, others in taken
                if not any(lives[edge.name] & lives[other] for other in others)
            ]
            if not free:
                buffers.append(Buffer(size, selected))
            number = free[0] if free else len(buffers) - 1
            places[edge.name] = Place(number, 0, size)
        if together:
            columns = _columns(together, lives, element_bytes)
            width = _aligned(max(end for _, end in columns.values()))
            if width % _PAGE == 0:
                width += _ALIGNMENT
            for name, (start, end) in columns.items():
                places[name] = Place(len(buffers), start, end - start)
            buffers.append(Buffer(width, selected))
    return Workspace(tuple(buffers), places)


def _columns(
    edges: list[Edge], lives: Mapping[str, int], element_bytes: int
) -> dict[str, tuple[int, int]]:
    """First byte and end of each edge in a row: the widest first, each where it first fits."""
    columns: dict[str, tuple[int, int]] = {}
    for edge in sorted(edges, key=lambda edge: -_bytes(edge, element_bytes)):
        size = _bytes(edge, element_bytes)
        taken = sorted(columns[name] for name in columns if lives[name] & lives[edge.name])
        start = 0
        for other_start, other_end in taken:
            if start + size <= other_start:
                break
            start = max(start, _aligned(other_end))
        columns[edge.name] = (start, start + size)
    return columns


def _lives(graph: LayerGraph) -> dict[str, int]:
    """For each edge, when it holds something that is still read: bits, one per operation.

    All layers are looked at as one, because a place is the same in all of them.
    """
    lives = dict.fromkeys(graph.edges, 0)
    numbers: dict[tuple[int, str], int] = {}  # operations of a name are one moment in all layers
    order: list[tuple[int, Operation]] = []
    for number_of_part, operations in enumerate(graph.parts):
        kind = 0 if number_of_part == 0 else 2 if number_of_part == len(graph.layers) + 1 else 1
        for operation in operations:
            number = numbers.setdefault((kind, operation.name), len(numbers))
            order.append((number, operation))
    written: dict[tuple[str, Rows], int] = {}  # place in `order` of the last write of some rows
    for index, (now, operation) in enumerate(order):
        for edge in operation.reads.values():
            rows = Rows.ALL if edge in operation.reads_all_rows else operation.rows
            for part in rows.parts:
                for passed, _ in order[written.get((edge, part), index) : index + 1]:
                    lives[edge] |= 1 << passed
        for edge in operation.writes.values():
            lives[edge] |= 1 << now
            written |= {(edge, part): index for part in operation.rows.parts}
    return lives


def _bytes(edge: Edge, element_bytes: int) -> int:
    sizes = {ElementType.INT64: 8, ElementType.FLOAT32: 4}
    return edge.width * sizes.get(edge.element, element_bytes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
