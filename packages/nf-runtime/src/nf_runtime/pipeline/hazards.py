"""What must come before what, from who reads and writes which rows of what memory. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nf_runtime.graph import BatchInput, Operation, Rows

_CACHES = (BatchInput.K_CACHE, BatchInput.V_CACHE)


@dataclass(frozen=True, slots=True)
class Access:
    """What an operation does to memory.

    Attributes:
        reads: Edges, each with whether it is read in all rows whatever the operation's own are.
        writes: Edges.
        reads_cache: Whether it reads K and V of its layer.
        writes_cache: Whether it writes them.
        rows: Its token range.
    """

    reads: tuple[tuple[str, bool], ...]
    writes: tuple[str, ...]
    reads_cache: bool
    writes_cache: bool
    rows: Rows


def access(operation: Operation) -> Access:
    """What an operation does."""
    caches = [source for source in operation.inputs.values() if source in _CACHES]
    return Access(
        reads=tuple(
            (edge, edge in operation.reads_all_rows)
            for edge in dict.fromkeys(operation.reads.values())
        ),
        writes=tuple(dict.fromkeys(operation.writes.values())),
        reads_cache=any(cache not in operation.updates for cache in caches),
        writes_cache=bool(operation.updates),
        rows=operation.rows,
    )


class Hazards:
    """Finds, in the order of the model, on whom each reader and writer depends.

    It depends on who wrote what it reads; and who writes, on whoever read or wrote what was in that
    memory before. A write to an edge stands for all use of the edge's rows before; for that of
    other edges, with which it may share some columns only, it does so to later writes of the edge.

    Args:
        sharing: For each edge, those that share memory with it (`Workspace.sharing`).
        rows_apart: Whether a row of one edge shares memory with the same row of another only
            (`Layout.BY_TOKEN`); else with any.
    """

    def __init__(self, sharing: Mapping[str, Iterable[str]], *, rows_apart: bool = True) -> None:
        self._sharing = sharing
        self._rows_apart = rows_apart
        self._writers: dict[str, list[tuple[int, int]]] = {name: [] for name in sharing}
        self._readers: dict[str, list[tuple[int, int]]] = {name: [] for name in sharing}

    def read(self, edge: str, cells: int, node: int) -> set[int]:
        """Whom a node depends on that reads some cells of an edge."""
        self._readers[edge].append((cells, node))
        return {writer for written, writer in self._writers[edge] if written & cells}

    def write(self, edge: str, cells: int, node: int) -> set[int]:
        """Whom a node depends on that writes some cells of an edge."""
        found = set()
        for other in self._sharing[edge]:
            meets_all = other != edge and not self._rows_apart
            for users in (self._writers[other], self._readers[other]):
                for used, user in users:
                    met = cells if meets_all else used & cells
                    if met and other != edge:
                        # Where it was written since, whoever did so has seen to it.
                        for written, writer in self._writers[edge]:
                            if writer > user:
                                met &= ~written
                    if met:
                        found.add(user)
        for users in (self._writers[edge], self._readers[edge]):
            users[:] = [(left, user) for used, user in users if (left := used & ~cells)]
        self._writers[edge].append((cells, node))
        found.discard(node)
        return found
