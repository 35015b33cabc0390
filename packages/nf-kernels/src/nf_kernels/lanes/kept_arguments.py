"""The tensors of operations that are queued on a lane."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from nf_kernels.lanes.lane import Event, Lane

_BETWEEN_EVENTS = 256


class KeptArguments:
    """Arguments of queued operations, kept alive until their lane is through with them.

    An event tells of many operations at a time, so that queueing one does not cost an event.
    """

    def __init__(self) -> None:
        # Those since the last event, and those before it.
        self._recent: list[Mapping[str, Any]] = []
        self._before: deque[tuple[Event, list[Mapping[str, Any]]]] = deque()

    def add(self, arguments: Mapping[str, Any], lane: Lane) -> None:
        """Keep the arguments of the operation that was queued last on a lane."""
        self._recent.append(arguments)
        if len(self._recent) == _BETWEEN_EVENTS:
            self._close(lane.record())

    def add_until(self, arguments: Mapping[str, Any], event: Event) -> None:
        """Keep arguments of an operation that was followed by an event on its lane."""
        self._recent.append(arguments)
        self._close(event)

    def _close(self, event: Event) -> None:
        """Let an event tell of the recent ones."""
        self._before.append((event, self._recent))
        self._recent = []
        while self._before and self._before[0][0].done():
            self._before.popleft()

    def clear(self) -> None:
        """Let go of all: the lane is idle, or will not run them any more."""
        self._recent.clear()
        self._before.clear()
