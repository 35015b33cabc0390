"""From a graph and a plan to a schedule. Torch-free.

The order in which a graph lists its operations, each on the whole batch, is what any plan has to
amount to. So dependencies are found by going through the nano-operations in that order, with the
rows that each reads and writes. What a lane's own order does not ensure, and no other wait, is
waited for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nf_runtime.graph import LayerGraph, Operation
from nf_runtime.pipeline.division import Structure
from nf_runtime.pipeline.hazards import Access, Hazards, access
from nf_runtime.pipeline.lane_clocks import LaneClocks
from nf_runtime.pipeline.plan import Plan, PlanError
from nf_runtime.pipeline.schedule import AFTER_APPEND, BEFORE_APPEND, Code, Schedule
from nf_runtime.pipeline.workspace import Workspace

_BEFORE, _AFTER = -1, -2  # as `Schedule.nodes` counts the two notices
_APPEND = "rope_append"


def compile_plan(
    graph: LayerGraph,
    plan: Plan,
    structure: Structure,
    *,
    workspace: Workspace | None = None,
    notices: bool = False,
) -> Schedule:
    """Compile a plan for batches of one structure.

    Layers that are alike need not be looked at one by one: some are compiled, and what repeats is
    repeated.

    Args:
        graph: The model.
        plan: How to run it.
        structure: Of the batch's division by `plan.nano_batches`.
        workspace: Where edges are; None gives each memory of its own.
        notices: Whether to tell, for every layer, that K and V are about to be appended, and that
            they were.

    Raises:
        PlanError: The plan does not fit the graph, or runs something before what it depends on.
    """
    if structure.num_nano_batches != len(plan.nano_batches):
        raise ValueError(
            f"structure is of {structure.num_nano_batches} nano-batches; plan {plan.name!r} has "
            f"{len(plan.nano_batches)}: divide the batch by the plan's"
        )
    sharing = {edge: (edge,) for edge in graph.edges} if workspace is None else workspace.sharing()
    behind = max((operation.layers_behind for operation in plan.operations), default=0) + notices
    some = 2 * behind + 6
    if len(graph.layers) > some and _are_alike(graph):
        short = replace(graph, layers=graph.layers[:some])
        compiled = _Compilation(short, plan, structure, sharing, notices=notices)
        schedule = compiled.repeated(graph, period=behind + 2)
        if schedule is not None:
            return schedule
    return _Compilation(graph, plan, structure, sharing, notices=notices).exact()


def _are_alike(graph: LayerGraph) -> bool:
    """Whether all layers have the same operations on the same edges; constants may differ."""
    first, *others = graph.layers
    shape = [(operation.name, access(operation)) for operation in first]
    return all(
        layer is first or [(operation.name, access(operation)) for operation in layer] == shape
        for layer in others
    )


@dataclass(slots=True)
class _Node:
    """A nano-operation while it is being placed."""

    part: int
    index: int  # in its part; _BEFORE and _AFTER
    first: int
    end: int
    placed: int  # in the plan; -1
    lane: int
    cells: int
    access: Access
    depends_on: set[int]
    starts_after: tuple[int, ...] = ()


class _Compilation:
    """One graph, one plan, one structure."""

    def __init__(
        self,
        graph: LayerGraph,
        plan: Plan,
        structure: Structure,
        sharing: Mapping[str, tuple[str, ...]],
        *,
        notices: bool,
    ) -> None:
        self._graph = graph
        self._plan = plan
        self._structure = structure
        self._notices = notices
        self._lanes = plan.lane_names
        self._placed = _placements(graph, plan)
        self._nodes: list[_Node] = []
        self._number: dict[tuple[int, int, int], int] = {}  # part, number in the plan, notice
        self._nodes_of_part: list[range] = []
        self._append_nodes: dict[int, list[int]] = defaultdict(list)
        self._find_dependencies(sharing)
        # By lane and tile: the numbers of the nodes. A tile is a passage through the plan's list.
        self._tiles = self._order()
        self._segments = self._commands()

    def exact(self) -> Schedule:
        """The schedule."""
        lanes = [
            np.array([c for tile in tiles for c in tile], dtype=np.int64).reshape(-1, 2)
            for tiles in self._segments
        ]
        return self._schedule(self._graph, self._table(), lanes, len(self._nodes))

    def repeated(self, graph: LayerGraph, *, period: int) -> Schedule | None:
        """The schedule of a graph with more layers of this kind; None if they do not repeat.

        Args:
            graph: All of it; this one has fewer of its layers.
            period: Number of the tile to repeat.
        """
        have, want = len(self._graph.layers), len(graph.layers)
        more = want - have
        per_layer = len(self._nodes_of_part[1])
        if any(len(part) != per_layer for part in self._nodes_of_part[1:-1]):
            return None
        start = len(self._nodes_of_part[0])
        behind_layers = start + have * per_layer

        def moved(commands: np.ndarray, layers: int) -> np.ndarray:
            """The same commands for nodes so many layers later, and those after all layers."""
            numbers = commands[:, 1]
            node = np.where(numbers < 0, -1 - numbers, numbers)
            shift = np.where(node < start, 0, layers * per_layer)
            shift = np.where(node < behind_layers, shift, more * per_layer)
            return np.stack(
                (commands[:, 0], numbers + np.where(numbers < 0, -shift, shift)), axis=1
            )

        lanes = []
        for tiles in self._segments:
            arrays = [np.array(tile, dtype=np.int64).reshape(-1, 2) for tile in tiles]
            if not np.array_equal(moved(arrays[period], 1), arrays[period + 1]):
                return None
            lanes.append(
                np.concatenate(
                    [
                        *(moved(array, 0) for array in arrays[: period + 1]),
                        *(moved(arrays[period], i) for i in range(1, more + 1)),
                        *(moved(array, more) for array in arrays[period + 1 :]),
                    ]
                )
            )
        table = self._table()
        layer = table[start : start + per_layer]
        layers = np.tile(layer, (want, 1))
        layers[:, 0] += np.repeat(np.arange(want), per_layer)
        after = table[behind_layers:].copy()
        after[:, 0] += more
        table = np.concatenate([table[:start], layers, after])
        return self._schedule(graph, table, lanes, len(table))

    def _schedule(
        self, graph: LayerGraph, table: np.ndarray, lanes: list[np.ndarray], num_nodes: int
    ) -> Schedule:
        """Events are numbers of nodes so far, negative ones for a start; give them numbers."""
        lengths = [len(commands) for commands in lanes]
        commands = np.concatenate(lanes)
        is_event = commands[:, 0] != Code.LAUNCH
        used, numbers = np.unique(commands[is_event, 1], return_inverse=True)
        commands[is_event, 1] = numbers
        split = np.split(commands.astype(np.int32), np.cumsum(lengths)[:-1])
        return Schedule(
            plan=self._plan,
            graph=graph,
            nodes=np.ascontiguousarray(table[:, :5]),
            placed=np.ascontiguousarray(table[:, 5]),
            commands=tuple(np.ascontiguousarray(part) for part in split),
            num_events=len(used),
        )

    def _table(self) -> np.ndarray:
        """int32 [N, 6]: part, number in it, first nano-batch, end, lane, number in the plan."""
        rows = [(n.part, n.index, n.first, n.end, n.lane, n.placed) for n in self._nodes]
        return np.array(rows, dtype=np.int32).reshape(-1, 6)

    # --- who depends on whom

    def _find_dependencies(self, sharing: Mapping[str, tuple[str, ...]]) -> None:
        hazards = Hazards(sharing)
        structure, whole = self._structure, (0, self._structure.num_nano_batches)
        known: dict[int, Access] = {}
        last = len(self._graph.layers) + 1
        for part, operations in enumerate(self._graph.parts):
            begin = len(self._nodes)
            appended: list[tuple[int, int]] = []  # cells whose K and V a node of this layer writes
            notice: int | None = None
            for index, operation in enumerate(operations):
                does = known.get(id(operation))
                if does is None:
                    does = known[id(operation)] = access(operation)
                if does.writes_cache and self._notices and notice is None:
                    notice = self._add(_Node(part, _BEFORE, *whole, -1, 0, 0, does, set()))
                for placed in self._placed[operation.name] if 0 < part < last else (-1,):
                    first, end, lane = whole[0], whole[1], 0
                    if placed >= 0:
                        numbers = self._plan.operations[placed].nano_batches
                        first, end = numbers[0], numbers[-1] + 1
                        lane = self._lanes.index(self._plan.operations[placed].lane)
                    cells = structure.cells(operation.rows, first, end)
                    if not cells & (
                        structure.occupied | (structure.selected if structure.has_selected else 0)
                    ):
                        continue
                    node = _Node(part, index, first, end, placed, lane, cells, does, set())
                    number = self._add(node)
                    self._depend(node, number, hazards, appended, notice)
            if notice is not None:
                after = _Node(part, _AFTER, *whole, -1, 0, 0, _NO_ACCESS, set())
                after.depends_on = {number for _, number in appended}
                self._add(after)
            self._nodes_of_part.append(range(begin, len(self._nodes)))

    def _depend(
        self,
        node: _Node,
        number: int,
        hazards: Hazards,
        appended: list[tuple[int, int]],
        notice: int | None,
    ) -> None:
        """Find whom a node depends on."""
        does, structure = node.access, self._structure
        found = node.depends_on
        for edge, whole in does.reads:
            cells = structure.selected - 1 if whole else node.cells
            found |= hazards.read(edge, cells, number)
        if does.reads_cache:
            context = structure.context(does.rows, node.first, node.end)
            found |= {writer for cells, writer in appended if cells & context}
        for edge in does.writes:
            found |= hazards.write(edge, node.cells, number)
        if does.writes_cache:
            appended.append((node.cells, number))
            self._append_nodes[node.part].append(number)
            if notice is not None:
                found.add(notice)
        found.discard(number)

    def _add(self, node: _Node) -> int:
        number = len(self._nodes)
        self._nodes.append(node)
        key = node.placed if node.placed >= 0 else node.index if node.index < 0 else -3 - node.index
        self._number[node.part, key, node.first] = number
        return number

    # --- the order of each lane

    def _order(self) -> list[list[list[int]]]:
        """Numbers of the nodes of each lane, by tile; what comes before and after has one each."""
        plan, count = self._plan, len(self._graph.layers)
        behind = [operation.layers_behind for operation in plan.operations]
        spread = max(behind, default=0)
        apart = self._notices and self._appends_on_several_lanes()
        tiles = count + spread + apart
        lanes: list[list[list[int]]] = [[[] for _ in range(tiles + 2)] for _ in self._lanes]
        lanes[0][0] += self._nodes_of_part[0]
        for tile in range(tiles):
            if apart:  # with a layer's leeway, so that lanes do not wait for each other
                lanes[0][tile + 1] += self._notice(tile, _BEFORE) + self._notice(tile - 1, _AFTER)
            for placed, operation in enumerate(plan.operations):
                layer = tile - behind[placed]
                first = operation.nano_batches[0]
                number = self._number.get((layer + 1, placed, first))
                if number is None:
                    continue
                node = self._nodes[number]
                ordered = lanes[node.lane][tile + 1]
                appends = self._append_nodes[layer + 1] if self._notices and not apart else []
                if appends and number == self._first_of(appends):
                    ordered += self._notice(layer, _BEFORE, node.lane)
                ordered.append(number)
                if appends and number == self._last_of(appends):
                    ordered += self._notice(layer, _AFTER, node.lane)
                self._start_after(node, tile)
        lanes[0][-1] += self._nodes_of_part[-1]
        return lanes

    def _appends_on_several_lanes(self) -> bool:
        return len({self._nodes[n].lane for part in self._append_nodes.values() for n in part}) > 1

    def _notice(self, layer: int, kind: int, lane: int = 0) -> list[int]:
        """The node that tells of a layer's K and V, if there is such a layer."""
        number = self._number.get((layer + 1, kind, 0))
        if number is None:
            return []
        self._nodes[number].lane = lane
        return [number]

    def _first_of(self, numbers: list[int]) -> int:
        return min(numbers, key=lambda number: self._nodes[number].placed)

    def _last_of(self, numbers: list[int]) -> int:
        return max(numbers, key=lambda number: self._nodes[number].placed)

    def _start_after(self, node: _Node, tile: int) -> None:
        """Find the nodes that must have started before this one does."""
        names = self._plan.operations[node.placed].after_start
        if names:
            numbers = [
                self._number.get((tile - other.layers_behind + 1, placed, other.nano_batches[0]))
                for placed, other in enumerate(self._plan.operations)
                if other.name in names
            ]
            node.starts_after = tuple(number for number in numbers if number is not None)

    # --- what each lane is told

    def _commands(self) -> list[list[list[tuple[int, int]]]]:
        """Commands of each lane by tile. Events are numbers of nodes; -1 - number: their start."""
        order = self._launch_order()
        clocks = LaneClocks(len(self._lanes))
        waits: dict[int, list[int]] = {}
        signalled: set[int] = set()
        for place, number in enumerate(order):
            node = self._nodes[number]
            clocks.begin(node.lane, number, place)
            waits[number] = needed = [
                other
                for other in sorted(node.depends_on, key=clocks.place, reverse=True)
                if clocks.wait_for_end(other)
            ]
            needed += [-1 - other for other in node.starts_after if clocks.wait_for_start(other)]
            signalled.update(needed)
            clocks.end()
        segments: list[list[list[tuple[int, int]]]] = []
        for tiles in self._tiles:
            segments.append([])
            for tile in tiles:
                told: list[tuple[int, int]] = []
                for number in tile:
                    told += [(Code.WAIT, event) for event in waits[number]]
                    if -1 - number in signalled:
                        told.append((Code.SIGNAL, -1 - number))
                    told.append((Code.LAUNCH, number))
                    if number in signalled:
                        told.append((Code.SIGNAL, number))
                segments[-1].append(told)
        return segments

    def _launch_order(self) -> list[int]:
        """All nodes, each behind those that it depends on and those before it on its lane."""
        lanes = [[number for tile in tiles for number in tile] for tiles in self._tiles]
        nexts = [0] * len(lanes)
        done = [False] * len(self._nodes)
        order: list[int] = []
        while len(order) < len(self._nodes):
            before = len(order)
            for lane, numbers in enumerate(lanes):
                while nexts[lane] < len(numbers):
                    number = numbers[nexts[lane]]
                    node = self._nodes[number]
                    if not all(done[other] for other in node.depends_on):
                        break
                    if not all(done[other] for other in node.starts_after):
                        break
                    done[number] = True
                    order.append(number)
                    nexts[lane] += 1
            if len(order) == before:
                heads = {
                    lane: numbers[nexts[lane]]
                    for lane, numbers in enumerate(lanes)
                    if nexts[lane] < len(numbers)
                }
                raise self._circle(heads, done)
        return order

    def _circle(self, heads: dict[int, int], done: list[bool]) -> PlanError:
        """Why no lane can go on.

        Args:
            heads: The next node of each lane.
            done: Which nodes have run.
        """
        lane = next(iter(heads))
        path: list[tuple[int, int]] = []  # a node, and one that it needs
        seen: list[int] = []
        while lane not in seen:
            seen.append(lane)
            node = self._nodes[heads[lane]]
            needs = (*sorted(node.depends_on), *node.starts_after)
            needed = next(other for other in needs if not done[other])
            path.append((heads[lane], needed))
            lane = self._nodes[needed].lane
        path = path[seen.index(lane) :]
        reasons = [
            f"{self._name(number)} needs {self._name(needed)}, {self._why(number, needed)}"
            for number, needed in path
        ]
        waiting, needed = path[0]
        if len(path) == 1:
            return PlanError(
                f"plan {self._plan.name!r}: on lane {self._lanes[self._nodes[waiting].lane]!r} "
                f"{self._name(waiting)} comes before {self._name(needed)}, but "
                f"{self._why(waiting, needed)}; change the order of operations"
            )
        return PlanError(
            f"plan {self._plan.name!r}: lanes wait for each other: {'; '.join(reasons)}; and each "
            "of these comes behind the one before on its lane: change the order of operations"
        )

    def _name(self, number: int) -> str:
        node = self._nodes[number]
        operation = _operation(self._graph, node.part, node.index)
        return f"{operation.name}:{node.first} of layer {node.part - 1}"

    def _why(self, number: int, needed: int) -> str:
        """What makes one node depend on another."""
        node, other = self._nodes[number], self._nodes[needed]
        if needed in node.starts_after:
            return "the plan lets it start first"
        read = [edge for edge, _ in node.access.reads if edge in other.access.writes]
        if read:
            return f"the first reads {read[0]!r}, which the second writes"
        if node.access.reads_cache and other.access.writes_cache:
            return "the first attends to keys and values that the second appends"
        return "the first writes to memory that the second still uses"


_NO_ACCESS = access(AFTER_APPEND)


def _operation(graph: LayerGraph, part: int, index: int) -> Operation:
    notices = {_BEFORE: BEFORE_APPEND, _AFTER: AFTER_APPEND}
    return notices[index] if index < 0 else graph.parts[part][index]


def _placements(graph: LayerGraph, plan: Plan) -> dict[str, list[int]]:
    """Where the plan lists each operation of the layers, by nano-batch.

    Raises:
        PlanError: It lists one that there is not, or not every nano-batch of one exactly once.
    """
    placed: defaultdict[str, list[int]] = defaultdict(list)
    for number, operation in enumerate(plan.operations):
        placed[operation.operation].append(number)
    names = list(dict.fromkeys(operation.name for layer in graph.layers for operation in layer))
    if unknown := [name for name in placed if name not in names]:
        raise PlanError(
            f"plan {plan.name!r} has the operation {unknown[0]!r}, which no layer has; "
            f"they have {', '.join(names)}"
        )
    count = len(plan.nano_batches)
    for name in names:
        placed[name].sort(key=lambda number: plan.operations[number].nano_batches)
        covered = [i for number in placed[name] for i in plan.operations[number].nano_batches]
        if covered != list(range(count)):
            raise PlanError(
                f"plan {plan.name!r} has operation {name!r} on nano-batches {covered}; expected "
                f"each of {list(range(count))} once"
            )
    return placed
