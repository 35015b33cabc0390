"""The nano-operations of an iteration, and which of them depend on which. Torch-free.

The order in which a graph lists its operations, each on the whole batch, is what any plan has to
amount to. So dependencies are found by going through the nano-operations in that order, with the
rows that each reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nf_runtime.graph import LayerGraph, Operation
from nf_runtime.pipeline.division import Structure
from nf_runtime.pipeline.hazards import Access, Hazards, access
from nf_runtime.pipeline.placements import Placement, find_placements
from nf_runtime.pipeline.plan import Plan
from nf_runtime.pipeline.schedule import AFTER, AFTER_APPEND, BEFORE, BEFORE_APPEND, operation_of
from nf_runtime.pipeline.workspace import Layout

_NOTICE_ACCESS = {BEFORE: access(BEFORE_APPEND), AFTER: access(AFTER_APPEND)}


@dataclass(slots=True)
class DependencyNode:
    """A nano-operation that has no place in a lane yet.

    Attributes:
        part: Part of the graph, as in `Schedule.nodes`.
        index: Number of its operation in that part; `BEFORE` or `AFTER`.
        placement: Where the plan lists it.
        cells: Those of its rows that have tokens, see `Structure`.
        access: What it does to memory.
        lane: Number of its lane. A notice gets one when the lanes are put in order.
        needs: Numbers of the nodes that must have ended before it starts.
        starts_after: Numbers of the nodes that must have started before it does.
    """

    part: int
    index: int
    placement: Placement
    cells: int
    access: Access
    lane: int
    needs: set[int] = field(default_factory=set)
    starts_after: tuple[int, ...] = ()


class DependencyGraph:
    """What a plan makes of a graph for batches of one structure.

    Nano-operations without a row are left out.

    Args:
        graph: The model.
        plan: How to run it.
        structure: Of the batch's division by `plan.nano_batches`.
        sharing: For each edge, those that share memory with it (`Workspace.sharing`).
        layout: How their rows lie in it.
        notices: Whether to tell of each layer's keys and values (`BEFORE_APPEND`, `AFTER_APPEND`).

    Attributes:
        nodes: By number, in the order of the model.
        parts: Numbers of the nodes of each part of the graph.
        appends: Placements of the nodes that append keys and values in every layer.

    Raises:
        PlanError: The plan does not list each nano-batch of each operation once.
    """

    def __init__(
        self,
        graph: LayerGraph,
        plan: Plan,
        structure: Structure,
        sharing: Mapping[str, Iterable[str]],
        layout: Layout,
        *,
        notices: bool,
    ) -> None:
        self.graph = graph
        self.plan = plan
        self.notices = notices
        self.nodes: list[DependencyNode] = []
        self.parts: list[range] = []
        self._structure = structure
        self._occupied = structure.occupied | (structure.selected if structure.has_selected else 0)
        self._numbers: dict[tuple[int, int], int] = {}  # by part, and number in the plan
        self._notices: dict[tuple[int, int], int] = {}  # by part, and which of the two
        self._hazards = Hazards(sharing, rows_apart=layout is Layout.BY_TOKEN)
        self._accesses: dict[int, Access] = {}
        self._whole = Placement(-1, 0, structure.num_nano_batches, 0)
        placements = find_placements(graph, plan)
        appends: dict[Placement, None] = {}
        for part, operations in enumerate(graph.parts):
            in_layers = 0 < part < len(graph.layers) + 1
            begin = len(self.nodes)
            appended = self._add_part(part, operations, placements if in_layers else {})
            self.parts.append(range(begin, len(self.nodes)))
            appends |= dict.fromkeys(self.nodes[number].placement for number in appended)
        self.appends = tuple(appends)

    def find(self, layer: int, number: int) -> int | None:
        """A layer's node for a number in the plan; None if it has none, or no rows."""
        return self._numbers.get((layer + 1, number))

    def notice(self, layer: int, kind: int) -> int | None:
        """The node that tells of a layer's keys and values; None if there is no such layer."""
        return self._notices.get((layer + 1, kind))

    def name(self, number: int) -> str:
        """What a plan calls a node, and the layer."""
        node = self.nodes[number]
        operation = operation_of(self.graph, node.part, node.index)
        return f"{operation.name}:{node.placement.first} of layer {node.part - 1}"

    def _add_part(
        self,
        part: int,
        operations: Iterable[Operation],
        placements: Mapping[str, Iterable[Placement]],
    ) -> list[int]:
        """Add the nodes of a part; those that append keys and values."""
        structure, whole = self._structure, (self._whole,)
        appended: list[int] = []
        for index, operation in enumerate(operations):
            does = self._access(operation)
            for placement in placements.get(operation.name, whole):
                cells = structure.cells(operation.rows, placement.first, placement.end)
                cells &= self._occupied
                if not cells:
                    continue
                if does.writes_cache and self.notices and not appended:
                    self._add_notice(part, BEFORE)
                number = len(self.nodes)
                node = DependencyNode(part, index, placement, cells, does, placement.lane)
                self.nodes.append(node)
                self._numbers[part, placement.number] = number
                self._depend(node, number, appended)
                if does.writes_cache:
                    appended.append(number)
        if appended and self.notices:
            self._add_notice(part, AFTER, needs=set(appended))
        return appended

    def _access(self, operation: Operation) -> Access:
        found = self._accesses.get(id(operation))
        if found is None:
            found = self._accesses[id(operation)] = access(operation)
        return found

    def _add_notice(self, part: int, kind: int, needs: Iterable[int] = ()) -> None:
        self._notices[part, kind] = len(self.nodes)
        does = _NOTICE_ACCESS[kind]
        self.nodes.append(DependencyNode(part, kind, self._whole, 0, does, 0, set(needs)))

    def _depend(self, node: DependencyNode, number: int, appended: Iterable[int]) -> None:
        """Find whom a node depends on."""
        does, hazards, needs = node.access, self._hazards, node.needs
        for edge, whole in does.reads:
            needs |= hazards.read(
                edge, self._structure.selected - 1 if whole else node.cells, number
            )
        if does.reads_cache:
            placement = node.placement
            context = self._structure.context(does.rows, placement.first, placement.end)
            needs |= {writer for writer in appended if self.nodes[writer].cells & context}
        for edge in does.writes:
            needs |= hazards.write(edge, node.cells, number)
        if does.writes_cache:
            notice = self._notices.get((node.part, BEFORE))
            if notice is not None:
                needs.add(notice)
