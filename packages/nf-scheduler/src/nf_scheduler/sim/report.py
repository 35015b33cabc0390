"""What a simulation has shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nf_scheduler.ledger import Ledger
from nf_scheduler.sim.trace import Trace

_LEVELS = (50, 90, 99)
_MOST_POINTS = 2000


@dataclass(slots=True)
class Timeline:
    """How things stood after iterations: all of them, or every second, fourth, … of many.

    Attributes:
        seconds: when.
        pages: in use.
        running: requests.
        waiting: requests.
        tokens: of the iteration.
    """

    seconds: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    _step: int = 1
    _skipped: int = 0

    def add(self, seconds: float, pages: int, running: int, waiting: int, tokens: int) -> None:
        """Note a moment."""
        self._skipped += 1
        if self._skipped < self._step:
            return
        self._skipped = 0
        for column, value in zip(
            self.columns().values(), (seconds, pages, running, waiting, tokens), strict=True
        ):
            column.append(value)
        if len(self.seconds) > _MOST_POINTS:
            self._step *= 2
            for column in self.columns().values():
                del column[::2]

    def columns(self) -> dict[str, list[Any]]:
        """The columns by name."""
        return {
            "seconds": self.seconds,
            "pages": self.pages,
            "running": self.running,
            "waiting": self.waiting,
            "tokens": self.tokens,
        }


@dataclass(slots=True, frozen=True)
class Spread:
    """Of a quantity in seconds: mean and percentiles.

    Attributes:
        mean: of all requests.
        p50: half of them have no more.
        p90: nine of ten.
        p99: 99 of 100.
    """

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """The spread of some values; zeros if there are none."""
        if not len(values):
            return cls(0.0, 0.0, 0.0, 0.0)
        return cls(float(values.mean()), *np.percentile(values, _LEVELS).tolist())


@dataclass(slots=True, frozen=True, kw_only=True)
class SimulationReport:
    """What a simulation has shown.

    Attributes:
        num_requests: that were run.
        num_too_long: that were left out, because they do not fit into the context.
        seconds: from the first arrival to the last token.
        busy_share: of that time the device had an iteration.
        requests_per_second: throughput.
        output_tokens_per_second: throughput.
        total_tokens_per_second: throughput, prompts and answers.
        ttft: from a request's arrival to its first token.
        tpot: per token after that, by request.
        latency: from a request's arrival to its end.
        num_preemptions: how often a request gave up its pages.
        preempted_share: of the requests did so.
        mean_running: requests in an iteration, on average over time.
        mean_pages: in use, as a share of all, on average over time.
        peak_pages: in use, as a share of all.
        num_iterations: that ran.
        tokens_per_iteration: on average.
        timeline: how things stood in between.
    """

    num_requests: int
    num_too_long: int
    seconds: float
    busy_share: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft: Spread
    tpot: Spread
    latency: Spread
    num_preemptions: int
    preempted_share: float
    mean_running: float
    mean_pages: float
    peak_pages: float
    num_iterations: int
    tokens_per_iteration: float
    timeline: Timeline

    @classmethod
    def of(
        cls,
        trace: Trace,
        ledgers: Sequence[Ledger],
        timeline: Timeline,
        *,
        seconds: float,
        busy_seconds: float,
        num_iterations: int,
        num_tokens: int,
        num_pages: int,
    ) -> SimulationReport:
        """Add up a simulation.

        Args:
            trace: what was run.
            ledgers: of its requests, in order.
            timeline: how things stood.
            seconds: how long it took.
            busy_seconds: of that, the device was busy.
            num_iterations: that ran.
            num_tokens: that they computed.
            num_pages: of the KV cache.
        """
        first = np.array([ledger.first_token for ledger in ledgers], dtype=np.float64)
        end = np.array([ledger.finished for ledger in ledgers], dtype=np.float64)
        outputs = np.array([ledger.output_tokens for ledger in ledgers])
        preemptions = np.array([ledger.preemptions for ledger in ledgers])
        several = outputs > 1
        spans = np.diff(np.array([0.0, *timeline.seconds]))
        whole = max(float(spans.sum()), 1e-12)
        seconds = max(seconds, 1e-12)
        return cls(
            num_requests=len(ledgers),
            num_too_long=trace.num_too_long,
            seconds=seconds,
            busy_share=busy_seconds / seconds,
            requests_per_second=len(ledgers) / seconds,
            output_tokens_per_second=float(outputs.sum()) / seconds,
            total_tokens_per_second=float(outputs.sum() + trace.prompt_lens.sum()) / seconds,
            ttft=Spread.of(first - trace.arrivals),
            tpot=Spread.of((end - first)[several] / (outputs[several] - 1)),
            latency=Spread.of(end - trace.arrivals),
            num_preemptions=int(preemptions.sum()),
            preempted_share=float((preemptions > 0).mean()),
            mean_running=float(spans @ np.array(timeline.running)) / whole,
            mean_pages=float(spans @ np.array(timeline.pages)) / whole / num_pages,
            peak_pages=max(timeline.pages, default=0) / num_pages,
            num_iterations=num_iterations,
            tokens_per_iteration=num_tokens / max(num_iterations, 1),
            timeline=timeline,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return asdict(self) | {"timeline": self.timeline.columns()}
