"""Runs a scheduler against a trace, in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nf_scheduler.admission import Admission, PredictedPeak, ReservingAdmission
from nf_scheduler.batch import Batch
from nf_scheduler.config import SchedulerConfig
from nf_scheduler.ledger import Ledger
from nf_scheduler.output_lengths import OutputLengths
from nf_scheduler.policy import Policy
from nf_scheduler.request import Request
from nf_scheduler.result import IterationResult
from nf_scheduler.scheduler import Scheduler
from nf_scheduler.sim.cost import IterationCost
from nf_scheduler.sim.pages import CountedPages
from nf_scheduler.sim.report import SimulationReport, Timeline
from nf_scheduler.sim.trace import Trace

ADMISSIONS = ("predict", "reserve", "greedy", "oracle")
"""Whether there are pages for one more (`nf_scheduler.admission`); `oracle` knows the lengths."""

_STOP_ID = 1


@dataclass(slots=True, frozen=True, kw_only=True)
class SimulationConfig:
    """What is simulated.

    Attributes:
        num_pages: of the KV cache.
        page_size: token slots of a page.
        max_model_len: tokens of prompt and answer together.
        max_tokens: limit of every answer, as far as the context has room.
        max_num_seqs: requests running at once.
        max_num_batched_tokens: tokens of an iteration.
        max_prefill_chunk: prompt tokens of one request in an iteration; None is no limit.
        admission: one of `ADMISSIONS`.
        lag: iterations that are formed ahead of results.

    Raises:
        ValueError: for a number below 1, a negative lag, or another admission.
    """

    num_pages: int = 20_000
    page_size: int = 16
    max_model_len: int = 16_384
    max_tokens: int = 1024
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 2048
    max_prefill_chunk: int | None = None
    admission: str = "predict"
    lag: int = 1

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.lag < 0:
            raise ValueError(f"lag is {self.lag}; expected 0 or more.")
        if self.admission not in ADMISSIONS:
            raise ValueError(
                f"admission is {self.admission!r}; expected one of {', '.join(ADMISSIONS)}."
            )


class _CertainLengths:
    """Nobody ends before its limit."""

    def survival(self, lengths: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """1, always."""
        return np.ones((len(lengths), len(ahead)))


class Simulation:
    """One run of a trace.

    Args:
        trace: who comes when, and how long they are.
        config: what is simulated.
        cost: how long iterations take.
        policy: who goes first.
    """

    def __init__(
        self,
        trace: Trace,
        config: SimulationConfig,
        cost: IterationCost,
        policy: Policy | None = None,
    ) -> None:
        self._trace = trace
        self._config = config
        self._cost = cost
        self._now = 0.0
        self._pages = CountedPages(
            config.num_pages, config.page_size, cost.restore_token_seconds, self._clock
        )
        lengths = OutputLengths(config.max_model_len)
        self._scheduler = Scheduler(
            self._pages,
            SchedulerConfig(
                max_model_len=config.max_model_len,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_num_seqs=config.max_num_seqs,
                max_prefill_chunk=config.max_prefill_chunk,
            ),
            policy=policy,
            admission=_make_admission(config, lengths),
            lengths=lengths,
            clock=self._clock,
        )
        limits = np.minimum(config.max_tokens, config.max_model_len - trace.prompt_lens)
        self._limits = np.maximum(limits, 1)
        self._output_lens = np.minimum(trace.output_lens, self._limits)
        self._sampled = np.zeros(len(trace), dtype=np.int64)  # tokens by request
        self._next = 0  # who comes next
        self._device_free = 0.0
        self._busy = 0.0
        self._in_flight: deque[tuple[Batch, np.ndarray, float]] = deque()
        self._ledgers: list[Ledger | None] = [None] * len(trace)
        self._timeline = Timeline()
        self._num_tokens = 0
        self._num_iterations = 0

    def run(self, on_finish: Callable[[int], object] = lambda count: None) -> SimulationReport:
        """Run it to the end.

        Args:
            on_finish: called with the number of requests that an iteration has finished.
        """
        scheduler = self._scheduler
        while self._next < len(self._trace) or scheduler.has_work:
            self._arrive()
            batch = scheduler.schedule()
            if batch is not None:
                self._launch(batch)
            if len(self._in_flight) > self._config.lag or (batch is None and self._in_flight):
                on_finish(self._commit())
            elif batch is None:
                self._idle()
        return SimulationReport.of(
            self._trace,
            [ledger for ledger in self._ledgers if ledger is not None],
            self._timeline,
            seconds=self._now,
            busy_seconds=self._busy,
            num_iterations=self._num_iterations,
            num_tokens=self._num_tokens,
            num_pages=self._config.num_pages,
        )

    def _clock(self) -> float:
        return self._now

    def _arrive(self) -> None:
        """Queue whoever has come by now."""
        trace = self._trace
        while self._next < len(trace) and trace.arrivals[self._next] <= self._now:
            number = self._next
            limits = self._output_lens if self._config.admission == "oracle" else self._limits
            self._scheduler.add(
                Request(
                    str(number),
                    np.zeros(trace.prompt_lens[number], dtype=np.int32),
                    int(limits[number]),
                    stop_token_ids=frozenset({_STOP_ID}),
                )
            )
            self._next += 1

    def _launch(self, batch: Batch) -> None:
        """Give the device an iteration, which it begins when it has done those before."""
        numbers = np.array([int(name) for name in batch.request_ids])
        sampling = numbers[batch.samples]
        self._sampled[sampling] += 1
        token_ids = np.zeros(len(batch), dtype=np.int32)
        ends = self._sampled[sampling] == self._output_lens[sampling]
        token_ids[batch.samples] = np.where(ends, _STOP_ID, 0)
        seconds = self._cost.seconds(batch)
        self._device_free = max(self._now, self._device_free) + seconds
        self._busy += seconds
        self._in_flight.append((batch, token_ids, self._device_free))
        self._num_tokens += batch.num_tokens
        self._num_iterations += 1

    def _commit(self) -> int:
        """Wait for the oldest iteration; give the number of requests that it finishes."""
        batch, token_ids, end = self._in_flight.popleft()
        self._now = max(self._now, end)
        progress = self._scheduler.commit(IterationResult(batch.iteration, token_ids))
        for name, finished in progress.ends.items():
            self._ledgers[int(name)] = finished.ledger
        stats = self._scheduler.stats
        used = self._config.num_pages - self._pages.num_available
        self._timeline.add(self._now, used, stats.num_running, stats.num_waiting, batch.num_tokens)
        return len(progress.ends)

    def _idle(self) -> None:
        """Let time pass until something happens."""
        moments = [self._pages.next_restore]
        if self._next < len(self._trace):
            moments.append(float(self._trace.arrivals[self._next]))
        self._now = max(self._now, min(moment for moment in moments if moment is not None))


def _make_admission(config: SimulationConfig, lengths: OutputLengths) -> Admission:
    if config.admission == "predict":
        return PredictedPeak(lengths, config.max_model_len)
    if config.admission == "oracle":
        return PredictedPeak(_CertainLengths(), config.max_model_len)
    return ReservingAdmission() if config.admission == "reserve" else Admission()
