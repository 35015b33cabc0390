"""How many of a CUDA device's SMs each lane gets, where they come in groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nf_kernels.lanes.lane import grant


@dataclass(frozen=True, slots=True)
class SmGrant:
    """What a lane gets of a device that is divided into groups of SMs.

    Attributes:
        groups: Numbers of the groups.
        remainder: Whether it gets the SMs that belong to no group, too.
        units: Numbers of its SMs, counted in the order of the groups, the remainder last.
    """

    groups: tuple[int, ...]
    remainder: bool
    units: tuple[int, ...]


def grant_sms(
    *, groups: int, group_size: int, remainder: int, shares: Sequence[float]
) -> list[SmGrant]:
    """Divide groups of SMs by shares, and leave none over.

    As `lane.grant` for the groups. The remainder goes to the lane that is furthest below its
    share, and where lanes share a group, to all that do.

    Args:
        groups: Groups that the driver makes of the device.
        group_size: SMs of a group, the granularity.
        remainder: SMs in no group.
        shares: As `lane.grant`.

    Raises:
        ValueError: As `lane.grant`.
    """
    granted = grant(range(groups), shares)
    sms = groups * group_size + remainder
    missing = [
        sms * share / sum(shares) - len(numbers) * group_size
        for share, numbers in zip(shares, granted, strict=True)
    ]
    neediest = granted[missing.index(max(missing))] if remainder else ()
    return [
        SmGrant(
            groups=numbers,
            remainder=numbers == neediest,
            units=tuple(
                sm
                for number in numbers
                for sm in range(number * group_size, (number + 1) * group_size)
            )
            + (tuple(range(groups * group_size, sms)) if numbers == neediest else ()),
        )
        for numbers in granted
    ]
