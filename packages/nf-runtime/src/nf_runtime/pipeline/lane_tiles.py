"""In which order each lane runs its nano-operations. Torch-free."""

from __future__ import annotations

from nf_runtime.pipeline.dependency_graph import DependencyGraph
from nf_runtime.pipeline.schedule import AFTER, BEFORE


class LaneTiles:
    """The nodes of each lane, by tile.

    A *tile* is a passage through the plan's list: tile i holds layer i of what is no layer behind,
    layer i - 1 of what is one behind, and so on. What comes before and after the layers has a tile
    of its own.

    Notices stand beside the appends that they are about. Where these are on several lanes, notices
    are on the lane of the whole device: a layer is announced with the first tile that appends to
    it, and told of a tile after the last, so that lanes need not wait for each other. An order of
    lanes that leaves no room for that is legal all the same: notices are *outermost* then, all
    layers announced before the first and told of after the last.

    Args:
        dependencies: The nodes; gives notices their lane, and all nodes their `starts_after`.
        outermost: Where to put notices of appends on several lanes.

    Attributes:
        lanes: Numbers of nodes by lane, tile and place.
        tile_of: Number of the tile of each node, by the node's.
        have_leeway: Whether notices stand a tile apart from the appends they are about.
    """

    def __init__(self, dependencies: DependencyGraph, *, outermost: bool = False) -> None:
        self._dependencies = dependencies
        plan, self._layers = dependencies.plan, len(dependencies.graph.layers)
        self._behind = [operation.layers_behind for operation in plan.operations]
        appends = dependencies.appends if dependencies.notices else ()
        apart = len({append.lane for append in appends}) > 1
        self.have_leeway = apart and not outermost
        tiles = self._layers + max(self._behind, default=0) + apart
        self.lanes: list[list[list[int]]] = [
            [[] for _ in range(tiles + 2)] for _ in plan.lane_names
        ]
        self.lanes[0][0] += dependencies.parts[0]
        if apart:
            self._put_notices_apart([self._behind[append.number] for append in appends])
        in_order = sorted((self._behind[append.number], append.number) for append in appends)
        first, last = (-1, -1) if apart or not in_order else (in_order[0][1], in_order[-1][1])
        for tile in range(tiles):
            for number, behind in enumerate(self._behind):
                found = dependencies.find(tile - behind, number)
                if found is None:
                    continue
                node = dependencies.nodes[found]
                self._start_after(found, tile)
                if number == first:
                    self._put_notice(tile - behind, BEFORE, node.lane, tile + 1)
                self.lanes[node.lane][tile + 1].append(found)
                if number == last:
                    self._put_notice(tile - behind, AFTER, node.lane, tile + 1)
        self.lanes[0][-1] += dependencies.parts[-1]
        self.tile_of = [0] * len(dependencies.nodes)
        for lane in self.lanes:
            for tile, numbers in enumerate(lane):
                for number in numbers:
                    self.tile_of[number] = tile

    def in_order(self) -> list[list[int]]:
        """The nodes of each lane."""
        return [[number for tile in tiles for number in tile] for tiles in self.lanes]

    def _put_notices_apart(self, behind: list[int]) -> None:
        for kind, leeway, outermost in ((BEFORE, min(behind), 0), (AFTER, max(behind) + 1, -1)):
            for layer in range(self._layers):
                tile = layer + leeway + 1 if self.have_leeway else outermost
                self._put_notice(layer, kind, 0, tile)

    def _put_notice(self, layer: int, kind: int, lane: int, tile: int) -> None:
        number = self._dependencies.notice(layer, kind)
        if number is not None:
            self._dependencies.nodes[number].lane = lane
            self.lanes[lane][tile].append(number)

    def _start_after(self, found: int, tile: int) -> None:
        """Find the nodes that must have started before one does."""
        dependencies, node = self._dependencies, self._dependencies.nodes[found]
        operations = dependencies.plan.operations
        names = operations[node.placement.number].after_start
        if names:
            numbers = [
                dependencies.find(tile - self._behind[number], number)
                for number, operation in enumerate(operations)
                if operation.name in names
            ]
            node.starts_after = tuple(number for number in numbers if number is not None)
