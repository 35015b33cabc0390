"""What a lane is, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self


class Event(Protocol):
    """A point in a lane's order of operations."""

    def done(self) -> bool:
        """Whether the lane has come to it."""

    def wait(self) -> None:
        """Block until the lane has come to it."""

    def seconds_since(self, earlier: Event) -> float:
        """Seconds between an earlier event of any lane of the device and this one, both done."""


class Lane(Protocol):
    """A share of one device's execution units with its own queue.

    Operations that are called inside of `with lane:` are queued and run in their order, beside
    those of other lanes; the call returns at once. The lane keeps their tensors alive; what they
    hold must not be touched before an event, or `synchronize`, says that the lane is through.

    Attributes:
        units: Execution units of this lane: numbers of cores, or of SMs.
        share: The part of the device's units that it was granted, which may differ from what was
            asked for.
        exclusive: Whether no other lane of the partition has any of these units.
    """

    units: tuple[int, ...]
    share: float
    exclusive: bool

    def __enter__(self) -> Self:
        """Send this thread's operations to the lane.

        Inside of another lane it does not wait for what that one has queued: `wait` does. From
        outside of lanes it comes after what was called before.
        """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Send them where they went before."""

    def record(self) -> Event:
        """Mark the point after what is queued."""

    def wait(self, event: Event) -> None:
        """Let what is queued from now on run after an event of another lane of the device."""

    def synchronize(self) -> None:
        """Block until the lane is idle.

        Raises:
            ValueError: An operation was given an index out of range. It, and what was queued after
                it, has not run.
        """

    def close(self) -> None:
        """Finish what is queued, and give the units back."""


def grant(units: Sequence[int], shares: Sequence[float]) -> list[tuple[int, ...]]:
    """Divide units by shares: disjoint where there are enough, and none is left over.

    Each lane gets at least one unit; what is left after rounding down goes to the largest
    remainders. With fewer units than lanes each has one, which several share.

    Args:
        units: The device's, in the order in which neighbours should stay together.
        shares: Positive proportions; [1, 1] halves the device, as [0.5, 0.5] does.

    Raises:
        ValueError: There are no shares, or one is not a positive number.
    """
    if not shares:
        raise ValueError("shares is empty; expected one share per lane")
    for i, share in enumerate(shares):
        if not 0 < share < float("inf"):
            raise ValueError(f"shares[{i}] is {share}; expected a positive number")
    count, total = len(units), sum(shares)
    if count <= len(shares):
        return [(units[i % count],) for i in range(len(shares))]
    exact = [count * share / total for share in shares]
    sizes = [max(1, int(size)) for size in exact]
    while sum(sizes) > count:  # small shares were rounded up to a unit, at the cost of the largest
        sizes[max(range(len(sizes)), key=lambda i: sizes[i])] -= 1
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i] - exact[i])[: count - sum(sizes)]:
        sizes[i] += 1
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [tuple(units[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
