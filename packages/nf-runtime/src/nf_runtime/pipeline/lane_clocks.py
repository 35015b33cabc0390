"""What each lane knows to have happened on the others. Torch-free."""

from __future__ import annotations


def start_of(node: int) -> int:
    """The event of a node's start; that of its end is the node's own number."""
    return -1 - node


class LaneClocks:
    """Vector clocks (Fidge, 1988; Mattern, 1989) of lanes, to leave out waits that others imply.

    Nodes are placed one after the other, each behind all that it waits for.

    Args:
        num_lanes: Of the schedule.
    """

    def __init__(self, num_lanes: int) -> None:
        self._known = [[-1] * num_lanes for _ in range(num_lanes)]  # by lane, a time on every lane
        self._events: dict[int, tuple[int, int, list[int]]] = {}  # lane, time, what it knows then
        self._node = self._lane = -1

    def begin(self, lane: int, node: int) -> None:
        """Place a node on a lane, behind the one before."""
        self._node, self._lane = node, lane

    def time(self, event: int) -> int:
        """When an event was placed; whatever happens before it has an earlier time."""
        return self._events[event][1]

    def wait_for(self, event: int) -> bool:
        """Let the current node run after an event; whether its lane has to wait for that.

        Of several events the latest comes first, as it may imply the others.
        """
        lane, time, theirs = self._events[event]
        mine = self._known[self._lane]
        if mine[lane] >= time:
            return False
        for other, known in enumerate(theirs):
            if known > mine[other]:
                mine[other] = known
        return True

    def end(self) -> None:
        """The current node waits for nothing more."""
        known, time = self._known[self._lane], len(self._events)
        for event, when in ((start_of(self._node), time), (self._node, time + 1)):
            known[self._lane] = when
            self._events[event] = self._lane, when, known.copy()
