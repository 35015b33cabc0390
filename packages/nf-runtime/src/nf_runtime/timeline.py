"""What ran when: the nano-operations of some iterations, by lane. Torch-free."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nf_runtime.pipeline.division import Division
from nf_runtime.pipeline.policy import Choice, Reason
from nf_runtime.pipeline.schedule import Schedule
from nf_scheduler import Batch

_KEPT = 64  # iterations


@dataclass(slots=True)
class IterationTrace:
    """One iteration that was timed.

    Attributes:
        iteration: Its number.
        tokens: Of its batch.
        decodes: So many of them.
        context: Tokens of all requests before it.
        reason: Why it ran by its plan.
        schedule: Of its plan.
        division: How its batch was cut.
        times: int64 [N, 2], start and end of every nano-operation, in ns since the first started;
            -1 for what had no rows.
    """

    iteration: int
    tokens: int
    decodes: int
    context: int
    reason: Reason
    schedule: Schedule
    division: Division
    times: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))

    @classmethod
    def of(
        cls, batch: Batch, schedule: Schedule, division: Division, reason: Reason
    ) -> IterationTrace:
        """Of an iteration that has just been launched."""
        return cls(
            iteration=batch.iteration,
            tokens=batch.num_tokens,
            decodes=batch.num_decodes,
            context=int(batch.context_lens.sum()),
            reason=reason,
            schedule=schedule,
            division=division,
        )

    @property
    def ran(self) -> np.ndarray:
        """int, numbers of the nano-operations that ran."""
        return np.flatnonzero(self.times[:, 1] >= 0)

    @property
    def wall_ns(self) -> int:
        """From the first start to the last end."""
        return int(self.times[:, 1].max(initial=0))

    @property
    def busy_ns(self) -> int:
        """Sum over all nano-operations."""
        ran = self.times[self.ran]
        return int((ran[:, 1] - ran[:, 0]).sum())

    @property
    def concurrency(self) -> float:
        """Sum of the times of all nano-operations by the time from the first to the last."""
        return self.busy_ns / self.wall_ns if self.wall_ns else 0.0

    def idle_ns(self) -> dict[str, int]:
        """For each lane that ran something, how long it did not."""
        lanes = self.schedule.nodes[:, 4]
        idle = {}
        for number, name in enumerate(self.schedule.plan.lane_names):
            own = self.times[(lanes == number) & (self.times[:, 1] >= 0)]
            if len(own):
                idle[name] = self.wall_ns - int((own[:, 1] - own[:, 0]).sum())
        return idle

    def overlaps(self) -> int:
        """Pairs of nano-operations of different lanes that ran at the same time."""
        lanes = self.schedule.nodes[:, 4]
        ran = self.ran
        order = ran[np.argsort(self.times[ran, 0], kind="stable")]
        open_ends: list[tuple[int, int]] = []
        count = 0
        for number in order.tolist():
            start, end = self.times[number].tolist()
            lane = int(lanes[number])
            open_ends = [(other, until) for other, until in open_ends if until > start]
            count += sum(other != lane for other, _ in open_ends)
            open_ends.append((lane, end))
        return count


class Timeline:
    """The iterations that were timed lately, and how all of them ran.

    Attributes:
        every: One of so many iterations is timed; 0: none.
        steps: How many iterations ran by which plan for which reason; grows.
    """

    def __init__(self, *, every: int = 0) -> None:
        self.every = every
        self.steps: Counter[tuple[str, str]] = Counter()
        self._since = 0
        self._traces: deque[IterationTrace] = deque(maxlen=_KEPT)

    @property
    def traces(self) -> Sequence[IterationTrace]:
        """The iterations that were timed, the last one last."""
        return tuple(self._traces)

    def count(self, choice: Choice) -> bool:
        """Count an iteration; whether it is to be timed."""
        self.steps[choice.plan.name, str(choice.reason)] += 1
        if not self.every:
            return False
        self._since += 1
        if self._since < self.every:
            return False
        self._since = 0
        return True

    def add(self, trace: IterationTrace, times: np.ndarray) -> None:
        """Keep an iteration that was timed."""
        trace.times = times
        self._traces.append(trace)

    def clear(self) -> None:
        """Forget the iterations that were timed."""
        self._traces.clear()
