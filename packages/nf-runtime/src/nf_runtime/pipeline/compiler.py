"""From a graph and a plan to a schedule. Torch-free.

What a lane's own order does not ensure, and no other wait, is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nf_runtime.graph import LayerGraph
from nf_runtime.pipeline.circular_wait import circular_wait
from nf_runtime.pipeline.dependency_graph import DependencyGraph
from nf_runtime.pipeline.division import Structure
from nf_runtime.pipeline.lane_clocks import LaneClocks, start_of
from nf_runtime.pipeline.lane_tiles import LaneTiles
from nf_runtime.pipeline.plan import Plan, PlanError
from nf_runtime.pipeline.repetition import Repetition, find_repetition
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

    Layers that repeat need not be looked at one by one: some are compiled, and what repeats is
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
    behind = max((listed.layers_behind for listed in plan.operations), default=0)
    repetition = find_repetition(graph, behind)
    if repetition is not None:
        short = replace(graph, layers=graph.layers[: repetition.layers])
        compiled = _Compilation(short, plan, structure, workspace, notices=notices)
        schedule = compiled.repeated(graph, repetition, behind)
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
        self._waits = self._find_waits(order)
        self._commands = self._tell(self._waits)

    def exact(self) -> Schedule:
        """The schedule."""
        lanes = [np.concatenate(tiles) for tiles in self._commands]
        return self._schedule(self._graph, self._table(), lanes)

    def repeated(self, graph: LayerGraph, repetition: Repetition, behind: int) -> Schedule | None:
        """The schedule of a graph with more layers of this kind; None if tiles do not repeat.

        What a tile waits for follows from what it depends on, and what the tiles within its reach
        wait for. So when that many are the same as those a period before, all later ones are.

        Args:
            graph: All of it; this one has fewer of its layers.
            repetition: Of its layers.
            behind: As many layers as operations of the plan run behind others.
        """
        head, period, have = repetition
        parts, table = self._dependencies.parts, self._table()
        more = len(graph.layers) - have  # whole periods
        start, end = parts[head + 1].start, parts[-1].start
        per_period = parts[head + 1 + period].start - start
        # What a node depends on is of its own layer, or of those of the period before.
        reach = behind + period
        first = head + reach + 1  # the first tile whose layers all have a period before them
        if not np.array_equal(
            table[start : start + per_period, 1:],
            table[start + per_period : start + 2 * per_period, 1:],
        ):
            return None
        if self._reaches_beyond(reach, start, first, first + period):
            return None

        def moved(commands: np.ndarray, layers: int | np.ndarray) -> np.ndarray:
            """The same commands for nodes so many layers later, and those after all layers."""
            numbers = commands[:, 1]
            node = np.where(numbers < 0, -1 - numbers, numbers)  # as `start_of`
            shift = np.where(node < end, layers, more)
            shift = np.where(node < start, 0, shift // period * per_period)
            result = commands.copy()
            result[:, 1] += np.where(numbers < 0, -shift, shift)
            return result

        lanes = []
        for tiles in self._commands:
            if not all(
                np.array_equal(moved(tiles[tile], period), tiles[tile + period])
                for tile in range(first, first + reach)
            ):
                return None
            repeating = np.concatenate(tiles[first : first + period])
            again = np.repeat(np.arange(period, more + 1, period), len(repeating))
            lanes.append(
                np.concatenate(
                    [
                        moved(np.concatenate(tiles[: first + period]), 0),
                        moved(np.tile(repeating, (more // period, 1)), again),
                        moved(np.concatenate(tiles[first + period :]), more),
                    ]
                )
            )
        layers = np.tile(table[start : start + per_period], (more // period, 1))
        layers[:, 0] += np.repeat(np.arange(0, more, period, dtype=np.int32), per_period)
        after = table[start:].copy()
        after[:, 0] += more
        return self._schedule(graph, np.concatenate([table[:start], layers, after]), lanes)

    def _reaches_beyond(self, reach: int, start: int, first: int, end: int) -> bool:
        """Whether a node depends on one of a later tile, or of tiles out of its reach.

        Tiles before the first stay as they are, and may depend on all before them. What comes after
        the layers may depend on tiles from `end` on, which move with it; and on layers that do not
        repeat, if it need not wait for them: with more layers in between it still need not.

        Args:
            reach: On how many tiles before its own a node of a tile that repeats may depend.
            start: The first node of a layer that repeats.
            first: The first tile that repeats.
            end: The one behind the last.
        """
        tile_of, parts = self._tiles.tile_of, self._dependencies.parts
        after = parts[-1].start
        for number, node in enumerate(self._dependencies.nodes):
            tile = tile_of[number]
            for other in (*node.needs, *node.starts_after):
                if tile_of[other] > tile:
                    return True
                if number < after:
                    if tile >= first and tile_of[other] < tile - reach:
                        return True
                elif tile_of[other] < end and (other >= start or other in self._waits[number]):
                    return True
        return False

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
