"""The loop that keeps a device busy: schedule, launch, poll, commit."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nf_kvcache import IterationOffload
from nf_runtime.iteration_output import IterationOutput
from nf_scheduler import Batch, IterationResult, Progress, Request, Scheduler, TokenBudget

_RESTORE_WAIT_SECONDS = 0.01  # so long a new request may wait, if all others wait for their KV


class IterationRunner(Protocol):
    """What runs iterations. `Executor` is one."""

    def launch(
        self, batch: Batch, page_tables: np.ndarray, offload: IterationOffload | None = None
    ) -> None:
        """As `Executor.launch`."""

    def poll(self) -> IterationOutput:
        """As `Executor.poll`."""

    def drain(self) -> None:
        """As `Executor.drain`."""


class PageTables(Protocol):
    """What the loop asks of whoever owns the KV pages. `nf_kvcache.KVCache` is one."""

    def poll(self) -> bool:
        """As `KVCache.poll`."""

    def wait(self, timeout: float) -> None:
        """As `KVCache.wait`."""

    def begin_iteration(
        self, seqs: list[str], context_lens: np.ndarray, new_lens: np.ndarray
    ) -> IterationOffload | None:
        """As `KVCache.begin_iteration`."""

    def page_tables(self, seqs: list[str]) -> np.ndarray:
        """As `KVCache.page_tables`."""


@dataclass(slots=True)
class LoopStats:
    """What a loop has done. Counters only grow.

    Attributes:
        iterations: That were committed.
        iterations_ahead: Those of them that were launched while another one was in flight.
        tokens: That they computed.
        busy_seconds: Time during which some iteration was in flight.
        last_commit_time: Unix time; 0 before the first.
    """

    iterations: int = 0
    iterations_ahead: int = 0
    tokens: int = 0
    busy_seconds: float = 0.0
    last_commit_time: float = 0.0


class IterationLoop:
    """Forms each iteration while those before it run, and takes results late.

    All that is asked of an engine goes through here, so that it can be written down and repeated
    (`nf_runtime.replay`).

    With a lag of 1, iteration i+1 is formed and launched while i runs and before i's tokens are
    known; then i is waited for. The device goes from one to the next without waiting. With a lag of
    0 every iteration waits for the one before.

    Args:
        scheduler: Says what runs.
        pages: Of its KV.
        runner: Runs it.
        lag: How many iterations results are taken late.
        clock: Seconds.

    Attributes:
        stats: What it has done.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pages: PageTables,
        runner: IterationRunner,
        *,
        lag: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = LoopStats()
        self._scheduler = scheduler
        self._pages = pages
        self._runner = runner
        self._lag = lag
        self._clock = clock
        self._in_flight: deque[IterationOffload | None] = deque()
        self._busy_since = 0.0

    @property
    def num_in_flight(self) -> int:
        """Iterations that were launched and not committed."""
        return len(self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a request; as `Scheduler.add`."""
        self._scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request early; as `Scheduler.abort`."""
        return self._scheduler.abort(request_id)

    def set_budgets(self, budgets: tuple[TokenBudget, ...]) -> None:
        """Form batches by other budgets; as `Scheduler.set_budgets`."""
        self._scheduler.set_budgets(budgets)

    def step(self) -> tuple[Progress, IterationOutput | None]:
        """Launch the next iteration, if one can run, and commit the oldest, if it is time.

        Where everybody waits for KV from a lower tier, it waits a moment for that.

        Returns:
            What requests gained, and the output of the iteration that was committed, if one was.

        Raises:
            Exception: Whatever an iteration raises, or an interrupt. Call `fail` then.
        """
        self._pages.poll()
        batch = self._scheduler.schedule()
        if batch is not None:
            self._launch(batch)
        if len(self._in_flight) > self._lag or (batch is None and self._in_flight):
            return self._commit()
        progress = self._scheduler.take_progress()
        if batch is None and not progress and self._scheduler.num_restoring:
            self._pages.wait(_RESTORE_WAIT_SECONDS)
        return progress, None

    def settle(self) -> tuple[Progress, IterationOutput]:
        """Commit the oldest iteration in flight, and start none; as `step` otherwise."""
        return self._commit()

    def sync(self) -> bool:
        """Let KV go on to the lower tiers while there is nothing to `step`.

        Returns:
            Whether some is still on its way.
        """
        return self._pages.poll()

    def fail(self) -> Progress:
        """End the requests of all iterations in flight; nothing that those wrote is reused.

        Returns:
            What requests gained: these have ended.
        """
        self._runner.drain()  # first: until then, what is abandoned may still be written to
        for offload in self._in_flight:
            if offload is not None:
                offload.abandon()
        self._in_flight.clear()
        batches = self._scheduler.in_flight
        for batch in batches:
            for request_id in batch.request_ids:
                self._scheduler.abort(request_id)
        progress = self._scheduler.take_progress()
        for batch in batches:
            result = IterationResult(batch.iteration, np.zeros(len(batch), dtype=np.int32))
            progress.ends |= self._scheduler.commit(result).ends
        return progress

    def _launch(self, batch: Batch) -> None:
        offload = self._pages.begin_iteration(
            batch.request_ids, batch.context_lens, np.diff(batch.query_start)
        )
        if self._in_flight:
            self.stats.iterations_ahead += 1
        else:
            self._busy_since = self._clock()
        self._in_flight.append(offload)
        self._runner.launch(batch, self._pages.page_tables(batch.request_ids), offload)
        self.stats.tokens += batch.num_tokens

    def _commit(self) -> tuple[Progress, IterationOutput]:
        output = self._runner.poll()
        progress = self._scheduler.commit(output.result)
        self._in_flight.popleft()
        now = self._clock()
        self.stats.busy_seconds += now - self._busy_since
        self._busy_since = now
        self.stats.iterations += 1
        self.stats.last_commit_time = time.time()
        return progress, output
