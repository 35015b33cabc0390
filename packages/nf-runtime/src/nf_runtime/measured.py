"""What was measured of a plan beside the sequential one. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from nf_runtime.timeline import IterationTrace

_LOAD = re.compile(r"(?:(\d{1,9})x(\d{1,9}))?(?:\+(\d{1,9}))?")


class Load(NamedTuple):
    """A batch.

    Attributes:
        decodes: Requests with one new token each.
        context: Tokens of each of them before it.
        prefill: New tokens of one more request, which has none before; 0: there is none.
    """

    decodes: int
    context: int
    prefill: int

    @property
    def tokens(self) -> int:
        """New tokens."""
        return self.decodes + self.prefill

    def __str__(self) -> str:
        decodes = f"{self.decodes}x{self.context}" if self.decodes else ""
        return decodes + (f"+{self.prefill}" if self.prefill or not decodes else "")

    @classmethod
    def parse(cls, text: str) -> Load:
        """The load that `str` writes so: `32x1024`, `32x1024+256` or `+256`.

        Raises:
            ValueError: It is written in another way, or has no tokens.
        """
        found = _LOAD.fullmatch(text.strip())
        numbers = [int(number or 0) for number in found.groups()] if found else [0, 0, 0]
        load = cls(*numbers)
        if not load.tokens:
            raise ValueError(
                f"load is {text!r}; expected DECODESxCONTEXT, such as 32x1024, +PREFILL, such as "
                "+256, or both"
            )
        return load


@dataclass(frozen=True, slots=True)
class Measured:
    """A plan beside the sequential one, iteration by iteration in turns.

    Attributes:
        plan: Its name.
        load: The batch.
        gain: Median of the sequential plan's time by this one's, from the first operation's start
            to the last one's end.
        quartiles: Of the same.
        wall_ms: Median of that time.
        seconds: Median of a whole iteration, from launch to result.
        concurrency: Median of the sum of all operations' times by that time.
        compute: Median part of the measured peak of products that was used.
        memory: Median part of the measured peak of reading that was used.
        network: Median part of the measured peak of sending that was used; None with one rank.
        traces: Of its iterations.
    """

    plan: str
    load: Load
    gain: float
    quartiles: tuple[float, float]
    wall_ms: float
    seconds: float
    concurrency: float
    compute: float
    memory: float
    network: float | None
    traces: tuple[IterationTrace, ...]

    @property
    def tokens_per_second(self) -> float:
        """New tokens of iterations one after the other."""
        return self.load.tokens / self.seconds

    @property
    def host_share(self) -> float:
        """Part of a whole iteration in which no operation ran: staging, sampling, the result."""
        return max(0.0, 1 - self.wall_ms * 1e-3 / self.seconds)

    @property
    def idle_ms(self) -> dict[str, float]:
        """For each lane that ran something, the median of how long it did not."""
        idle: dict[str, list[int]] = {}
        for trace in self.traces:
            for lane, nanoseconds in trace.idle_ns().items():
                idle.setdefault(lane, []).append(nanoseconds)
        return {lane: median(values) / 1e6 for lane, values in idle.items()}

    @property
    def overlaps(self) -> int:
        """Pairs of nano-operations of different lanes that ran at the same time, over all."""
        return sum(trace.overlaps() for trace in self.traces)
