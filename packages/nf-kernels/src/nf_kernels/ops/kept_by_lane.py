"""Operations whose tensors live until the lane that they are queued on is through with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class _KeepingLane(Protocol):
    def keep(self, arguments: Mapping[str, Any]) -> None: ...


def kept_by_lane(
    operation: Callable[..., None], current_lane: Callable[[], _KeepingLane | None]
) -> Callable[..., None]:
    """Let the lane that an operation is queued on keep its tensors alive.

    Args:
        operation: Takes its arguments by name.
        current_lane: Gives the lane that this thread's operations go to, or None.
    """

    @functools.wraps(operation)
    def call(**arguments: Any) -> None:
        operation(**arguments)
        lane = current_lane()
        if lane is not None:
            lane.keep(arguments)

    return call
