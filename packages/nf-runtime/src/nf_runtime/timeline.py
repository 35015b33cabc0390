"""What ran when: the nano-operations of some iterations, by lane. Torch-free."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nf_runtime.graph import Rows
from nf_runtime.pipeline.division import Division
from nf_runtime.pipeline.overlap_gain import OverlapGain
from nf_runtime.pipeline.plan import Plan
from nf_runtime.pipeline.policy import Choice, Reason
from nf_runtime.pipeline.schedule import Node, Schedule
from nf_runtime.pipeline.utilisation import Utilisation
from nf_scheduler import Batch

_KEPT = 64  # iterations


@dataclass(slots=True)
class IterationTrace:
    """One iteration that was timed.

    Attributes:
        iteration: Its number.
        tokens: Of its batch.
        decodes: So many of them.
        contexts: int [requests], tokens of each request before it.
        reason: Why it ran by its plan.
        schedule: Of its plan.
        division: How its batch was cut.
        start_ns: When its first nano-operation started, by a clock that is the same for all
            iterations where operations run as programs.
        times: int64 [N, 2], start and end of every nano-operation, in ns since the first started;
            -1 for what had no rows.
        gain: Time of sequential iterations with batches alike by that of this one, where it was
            measured.
    """

    iteration: int
    tokens: int
    decodes: int
    contexts: np.ndarray
    reason: Reason
    schedule: Schedule
    division: Division
    start_ns: int = 0
    times: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    gain: float | None = None

    @classmethod
    def of(
        cls, batch: Batch, schedule: Schedule, division: Division, reason: Reason
    ) -> IterationTrace:
        """Of an iteration that has just been launched."""
        return cls(
            iteration=batch.iteration,
            tokens=batch.num_tokens,
            decodes=batch.num_decodes,
            contexts=batch.context_lens.copy(),
            reason=reason,
            schedule=schedule,
            division=division,
        )

    def token_range(self, node: Node) -> tuple[int, int]:
        """First row of the batch that a nano-operation works on, and end; of selected rows, all."""
        rows = Rows.ALL if node.operation.rows is Rows.SELECTED else node.operation.rows
        return self.division.rows(rows, node.first, node.end)

    def summary(self, utilisation: Utilisation | None = None) -> dict[str, Any]:
        """What is to be said of it in a few numbers, as JSON takes them.

        Args:
            utilisation: What tells the use of the device, if that is to be said as well.
        """
        used = {}
        if utilisation is not None and self.wall_ns:
            used = utilisation.of(self.schedule, self.division, self.contexts, self.wall_ns * 1e-9)
        return {
            "iteration": self.iteration,
            "plan": self.schedule.plan.name,
            "reason": str(self.reason),
            "tokens": self.tokens,
            "decodes": self.decodes,
            "context_tokens": int(self.contexts.sum()),
            "wall_ms": self.wall_ns / 1e6,
            "concurrency": round(self.concurrency, 4),
            "gain": self.gain if self.gain is None else round(self.gain, 4),
            "idle_ms": {lane: ns / 1e6 for lane, ns in self.idle_ns().items()},
            **used,
        }

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

    Args:
        every: One of so many iterations is timed; 0: none.

    Attributes:
        every: See above.
        steps: How many iterations ran by which plan for which reason; grows.
        gain: What overlap gains.
    """

    def __init__(self, *, every: int = 0) -> None:
        self.every = every
        self.steps: Counter[tuple[str, str]] = Counter()
        self.gain = OverlapGain()
        self._since = 0
        self._traces: deque[IterationTrace] = deque(maxlen=_KEPT)

    @property
    def traces(self) -> Sequence[IterationTrace]:
        """The iterations that were timed, the last one last."""
        return tuple(self._traces)

    def revise(self, choice: Choice, sequential: Plan, tokens: int, decodes: int) -> Choice:
        """The choice itself, or the sequential plan where that is to be measured now."""
        return self.gain.revise(choice, sequential, tokens, decodes) if self.every else choice

    def count(self, choice: Choice) -> bool:
        """Count an iteration; whether it is to be timed."""
        self.steps[choice.plan.name, str(choice.reason)] += 1
        if not self.every:
            return False
        self._since += 1
        if self._since < self.every and choice.reason is not Reason.REFERENCE:
            return False
        self._since = 0
        return True

    def add(self, trace: IterationTrace) -> None:
        """Keep an iteration that was timed."""
        self._traces.append(trace)
        plan = trace.schedule.plan
        self.gain.add(plan, trace.reason, trace.tokens, trace.decodes, trace.wall_ns)
        if not plan.is_sequential:
            trace.gain = self.gain.of(trace.tokens, trace.decodes, trace.wall_ns)

    def clear(self) -> None:
        """Forget the iterations that were timed."""
        self._traces.clear()

    def reset(self) -> None:
        """Forget everything."""
        self.clear()
        self.steps.clear()
        self.gain = OverlapGain()
