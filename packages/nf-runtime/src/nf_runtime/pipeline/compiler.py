"""From a graph and a plan to a schedule. Torch-free.

What a lane's own order does not ensure, and no other wait, is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nf_runtime.graph import LayerGraph, Operation
from nf_runtime.pipeline.circular_wait import circular_wait
from nf_runtime.pipeline.dependency_graph import DependencyGraph
from nf_runtime.pipeline.division import Structure
from nf_runtime.pipeline.lane_clocks import LaneClocks, start_of
from nf_runtime.pipeline.lane_tiles import LaneTiles
from nf_runtime.pipeline.plan import Plan, PlanError
from nf_runtime.pipeline.schedule import Code, Schedule
from nf_runtime.pipeline.workspace import Layout, Workspace


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
    repeated. `compile_each_layer` gives the same.

    Args:
        graph: The model.
        plan: How to run it.
        structure: Of the batch's division by `plan.nano_batches`.
        workspace: Where edges are; None gives each memory of its own.
        notices: Whether to tell, for every layer, that K and V are about to be appended, and that
            they were.

    Raises:
        PlanError: The plan does not fit the graph, or runs something before what it depends on.
        ValueError: The structure is not one of the plan's.
    """
    # A node depends on others of its own layer and the one before: no more tiles back than this.
    reach = max((listed.layers_behind for listed in plan.operations), default=0) + 1
    some = 2 * reach + 5
    # The first layer may read other edges: with several ranks, nothing was added up before it.
    if len(graph.layers) > some and _are_alike(graph.layers[1:]):
        short = replace(graph, layers=graph.layers[:some])
        compiled = _Compilation(short, plan, structure, workspace, notices=notices)
        schedule = compiled.repeated(graph, reach=reach)
        if schedule is not None:
            return schedule
    return compile_each_layer(graph, plan, structure, workspace=workspace, notices=notices)


def compile_each_layer(
    graph: LayerGraph,
    plan: Plan,
    structure: Structure,
    *,
    workspace: Workspace | None = None,
    notices: bool = False,
) -> Schedule:
    """As `compile_plan`, without repeating anything: its slow twin."""
    return _Compilation(graph, plan, structure, workspace, notices=notices).exact()


def _are_alike(layers: Sequence[Sequence[Operation]]) -> bool:
    """Whether all layers have the same operations on the same edges; constants may differ."""
    first = layers[0]
    return all(
        len(layer) == len(first)
        and all(
            mine.name == other.name
            and mine.rows is other.rows
            and mine.reads == other.reads
            and mine.writes == other.writes
            and mine.inputs == other.inputs
            and mine.updates == other.updates
            and mine.reads_all_rows == other.reads_all_rows
            for mine, other in zip(first, layer, strict=True)
        )
        for layer in layers
    )


class _Compilation:
    """One graph, one plan, one structure."""

    def __init__(
        self,
        graph: LayerGraph,
        plan: Plan,
        structure: Structure,
        workspace: Workspace | None,
        *,
        notices: bool,
    ) -> None:
        if structure.num_nano_batches != len(plan.nano_batches):
            raise ValueError(
                f"structure is of {structure.num_nano_batches} nano-batches; plan {plan.name!r} "
                f"has {len(plan.nano_batches)}: divide the batch by the plan's"
            )
        sharing: dict[str, tuple[str, ...]] = (
            {edge: (edge,) for edge in graph.edges} if workspace is None else workspace.sharing()
        )
        self._graph = graph
        self._plan = plan
        # With one nano-batch nothing is gained by rows that never overlap.
        self._layout = Layout.BY_EDGE if len(plan.nano_batches) == 1 else Layout.BY_TOKEN
        self._dependencies = DependencyGraph(
            graph, plan, structure, sharing, self._layout, notices=notices
        )
        self._tiles = LaneTiles(self._dependencies)
        try:
            order = _launch_order(self._dependencies, self._tiles)
        except PlanError:
            if not self._tiles.have_leeway:
                raise
            self._tiles = LaneTiles(self._dependencies, outermost=True)
            order = _launch_order(self._dependencies, self._tiles)
        # Commands of each lane by tile, an event being the number that `LaneClocks` gives it.
        self._commands = self._tell(self._find_waits(order))

    def exact(self) -> Schedule:
        """The schedule."""
        lanes = [np.concatenate(tiles) for tiles in self._commands]
        return self._schedule(self._graph, self._table(), lanes)

    def repeated(self, graph: LayerGraph, *, reach: int) -> Schedule | None:
        """The schedule of a graph with more layers of this kind; None if tiles do not repeat.

        What a tile waits for follows from what it depends on, and what the tiles within its reach
        wait for. So when that many are the same as the one before, all later ones are.

        Args:
            graph: All of it; this one has fewer of its layers.
            reach: To how many tiles before its own a node's dependencies go.
        """
        parts, table = self._dependencies.parts, self._table()
        have, want = len(self._graph.layers), len(graph.layers)
        more, per_layer = want - have, len(parts[1])
        start, end = parts[1].start, parts[-1].start
        period = reach + 2  # the first tile of layers that have one before them that is like them
        if any(len(part) != per_layer for part in parts[1:-1]):
            return None
        layer = table[start : start + per_layer]
        if not np.array_equal(layer[:, 1:], table[start + per_layer : start + 2 * per_layer, 1:]):
            return None
        if self._reaches_beyond(reach, period):
            return None

        def moved(commands: np.ndarray, layers: int | np.ndarray) -> np.ndarray:
            """The same commands for nodes so many layers later, and those after all layers."""
            numbers = commands[:, 1]
            node = np.where(numbers < 0, -1 - numbers, numbers)  # as `start_of`
            shift = np.where(node < start, 0, layers * per_layer)
            shift = np.where(node < end, shift, more * per_layer)
            result = commands.copy()
            result[:, 1] += np.where(numbers < 0, -shift, shift)
            return result

        lanes = []
        for tiles in self._commands:
            if not all(
                np.array_equal(moved(tiles[tile], 1), tiles[tile + 1])
                for tile in range(period, period + reach)
            ):
                return None
            again = np.repeat(np.arange(1, more + 1), len(tiles[period]))
            lanes.append(
                np.concatenate(
                    [
                        moved(np.concatenate(tiles[: period + 1]), 0),
                        moved(np.tile(tiles[period], (more, 1)), again),
                        moved(np.concatenate(tiles[period + 1 :]), more),
                    ]
                )
            )
        layers = np.tile(layer, (want, 1))
        layers[:, 0] += np.repeat(np.arange(want), per_layer)
        after = table[end:].copy()
        after[:, 0] += more
        return self._schedule(graph, np.concatenate([table[:start], layers, after]), lanes)

    def _reaches_beyond(self, reach: int, period: int) -> bool:
        """Whether a node depends on one of a later tile, or of more than so many tiles before.

        What comes after the layers may depend on all tiles behind the one to repeat.
        """
        tile_of, after = self._tiles.tile_of, self._dependencies.parts[-1].start
        return any(
            not 0 <= tile_of[number] - tile_of[other] <= reach
            and (number < after or tile_of[other] <= period)
            for number, node in enumerate(self._dependencies.nodes)
            for other in (*node.needs, *node.starts_after)
        )

    def _find_waits(self, order: Sequence[int]) -> dict[int, list[int]]:
        """The events that each node waits for, without those that others imply."""
        clocks = LaneClocks(len(self._plan.lane_names))
        waits: dict[int, list[int]] = {}
        for number in order:
            node = self._dependencies.nodes[number]
            clocks.begin(node.lane, number)
            events = [*node.needs, *map(start_of, node.starts_after)]
            events.sort(key=clocks.time, reverse=True)
            # Sorted, so that nothing depends on which of many orders the nodes were placed in.
            waits[number] = sorted(event for event in events if clocks.wait_for(event))
            clocks.end()
        return waits

    def _tell(self, waits: dict[int, list[int]]) -> list[list[np.ndarray]]:
        """Commands of each lane by tile: int64 [n, 2]."""
        signalled = {event for events in waits.values() for event in events}
        told: list[list[np.ndarray]] = []
        for tiles in self._tiles.lanes:
            told.append([])
            for tile in tiles:
                commands: list[tuple[int, int]] = []
                for number in tile:
                    commands += [(Code.WAIT, event) for event in waits[number]]
                    if start_of(number) in signalled:
                        commands.append((Code.SIGNAL, start_of(number)))
                    commands.append((Code.LAUNCH, number))
                    if number in signalled:
                        commands.append((Code.SIGNAL, number))
                told[-1].append(np.array(commands, dtype=np.int64).reshape(-1, 2))
        return told

    def _table(self) -> np.ndarray:
        """int32 [N, 6]: part, number in it, first nano-batch, end, lane, number in the plan."""
        rows = [
            (node.part, node.index, at.first, at.end, node.lane, at.number)
            for node in self._dependencies.nodes
            for at in (node.placement,)
        ]
        return np.array(rows, dtype=np.int32).reshape(-1, 6)

    def _schedule(
        self, graph: LayerGraph, table: np.ndarray, lanes: Sequence[np.ndarray]
    ) -> Schedule:
        """Give the events numbers without gaps."""
        commands = np.concatenate(lanes)
        is_event = commands[:, 0] != Code.LAUNCH
        used, numbers = np.unique(commands[is_event, 1], return_inverse=True)
        commands[is_event, 1] = numbers
        split = np.split(commands.astype(np.int32), np.cumsum([len(lane) for lane in lanes])[:-1])
        return Schedule(
            plan=self._plan,
            graph=graph,
            nodes=np.ascontiguousarray(table[:, :5]),
            placed=np.ascontiguousarray(table[:, 5]),
            commands=tuple(np.ascontiguousarray(part) for part in split),
            num_events=len(used),
            layout=self._layout,
        )


def _launch_order(dependencies: DependencyGraph, tiles: LaneTiles) -> list[int]:
    """All nodes, each behind those that it waits for and those before it on its lane.

    Raises:
        PlanError: There is no such order.
    """
    nodes, lanes = dependencies.nodes, tiles.in_order()
    nexts = [0] * len(lanes)
    done = [False] * len(nodes)
    order: list[int] = []
    while len(order) < len(nodes):
        before = len(order)
        for lane, numbers in enumerate(lanes):
            while nexts[lane] < len(numbers):
                number = numbers[nexts[lane]]
                node = nodes[number]
                if not all(done[other] for other in (*node.needs, *node.starts_after)):
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
            raise circular_wait(dependencies, heads, done)
    return order
