"""What each lane knows to have happened on the others. Torch-free."""

from __future__ import annotations


class LaneClocks:
    """Vector clocks (Fidge, 1988; Mattern, 1989) of lanes, to leave out waits that others imply.

    Nodes are placed one after the other, each behind all that it depends on.

    Args:
        num_lanes: Of the schedule.
    """

    def __init__(self, num_lanes: int) -> None:
        self._now = [[-1] * num_lanes for _ in range(num_lanes)]  # by lane, places on every lane
        self._starts: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}
        self._where: dict[int, tuple[int, int]] = {}
        self._node = self._lane = -1

    def begin(self, lane: int, node: int, place: int) -> None:
        """Place a node on a lane, behind the one before.

        Args:
            lane: Its number.
            node: Its number.
            place: Grows with every node.
        """
        self._node, self._lane = node, lane
        self._where[node] = lane, place

    def place(self, node: int) -> int:
        """Where a node was placed."""
        return self._where[node][1]

    def wait_for_end(self, node: int) -> bool:
        """Let the current node run after the end of another; whether it has to wait for that."""
        lane, place = self._where[node]
        if self._now[self._lane][lane] >= place:
            return False
        self._merge(self._ends[node])
        return True

    def wait_for_start(self, node: int) -> bool:
        """Let the current node run after the start of another; whether it has to wait for that."""
        lane, place = self._where[node]
        if lane == self._lane or self._now[self._lane][lane] >= place:
            return False
        self._merge(self._starts[node])
        return True

    def end(self) -> None:
        """The current node is complete."""
        now = self._now[self._lane]
        self._starts[self._node] = now.copy()
        now[self._lane] = self._where[self._node][1]
        self._ends[self._node] = now.copy()

    def _merge(self, other: list[int]) -> None:
        now = self._now[self._lane]
        for lane, place in enumerate(other):
            now[lane] = max(now[lane], place)
