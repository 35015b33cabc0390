"""Continuous batching with chunked prefill, first come, first served."""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable
from operator import attrgetter

import numpy as np

from nf_scheduler.batch import Batch
from nf_scheduler.config import SchedulerConfig
from nf_scheduler.integrity import find_fault
from nf_scheduler.page_budget import PageBudget
from nf_scheduler.page_keeper import PageKeeper
from nf_scheduler.request import FinishReason, Request, RequestState
from nf_scheduler.result import IterationResult, TokenEvent
from nf_scheduler.running_set import RunningSet
from nf_scheduler.sequence import Sequence

_by_arrival = attrgetter("arrival")


class Scheduler:
    """Decides which tokens of which requests every iteration computes.

    `schedule` may run ahead of `commit`, by any number of iterations. It then schedules the next
    token of a request whose last token is not known yet as -1. If that request turns out to have
    finished, whatever later iterations in flight sample for it is dropped, and its pages and slot
    are freed once, when the last of them has been committed.

    A request whose prefix is in a lower tier gets its slot and pages and waits until the prefix is
    restored; later ones start meanwhile. What does not come is computed.

    When pages run out, the request that arrived last gives up its own and returns later; what it
    has generated stays, and what is not kept of its KV is computed again. The oldest request always
    goes on: its pages are never taken, and a restore ends. Not thread-safe.

    Args:
        pages: who owns the KV pages; used by this scheduler alone.
        config: limits of an iteration.
        clock: seconds, for the ledgers.

    Attributes:
        num_preemptions: how often a request gave up its pages, so far.
    """

    def __init__(
        self,
        pages: PageBudget,
        config: SchedulerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_preemptions = 0
        self._pages = pages
        self._config = config
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}  # all that are queued or have a slot
        self._queue: list[Sequence] = []  # by arrival
        self._running = RunningSet(config.max_num_seqs)
        self._keeper = PageKeeper(pages, self._running, clock)
        self._in_flight: deque[Batch] = deque()
        self._events: list[TokenEvent] = []  # of aborts that took effect at once
        self._num_arrivals = 0
        self._num_iterations = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is queued, runs, or is contained in an iteration in flight."""
        return bool(self._sequences)

    @property
    def num_waiting(self) -> int:
        """Requests that do not run now: queued, for the first time or again, or being restored."""
        return len(self._queue) + self._running.num_restoring

    @property
    def num_restoring(self) -> int:
        """Those of `num_waiting` that have pages and a slot, and wait for KV from a lower tier."""
        return self._running.num_restoring

    @property
    def num_running(self) -> int:
        """Requests that take part in iterations."""
        return self._running.num_running

    def state_of(self, request_id: str) -> RequestState:
        """Where a request stands.

        A finished one is remembered until no iteration in flight contains it.

        Raises:
            KeyError: no such request.
        """
        if request_id not in self._sequences:
            raise KeyError(f"No request {request_id!r}: it was never added, or it has finished.")
        return self._sequences[request_id].state

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: the id is in use, or the request is longer than the model's context or than
                all pages.
        """
        if request.request_id in self._sequences:
            raise ValueError(
                f"request_id {request.request_id!r} is in use; give every request its own."
            )
        total = request.prompt_len + request.max_tokens
        if total > self._config.max_model_len:
            raise ValueError(
                f"Request {request.request_id!r} may reach {total} tokens ({request.prompt_len} of "
                f"the prompt and max_tokens={request.max_tokens}), and max_model_len is "
                f"{self._config.max_model_len}. Shorten the prompt or lower max_tokens."
            )
        # The KV of the last token is never computed.
        needed = -(-(total - 1) // self._pages.page_size)
        if needed > self._pages.num_pages:
            raise ValueError(
                f"Request {request.request_id!r} may reach {total} tokens, which take {needed} "
                f"pages, and the KV cache has {self._pages.num_pages}. Lower max_tokens, or give "
                "the cache more memory."
            )
        sequence = Sequence(request, self._num_arrivals, self._clock())
        self._num_arrivals += 1
        self._sequences[request.request_id] = sequence
        self._queue.append(sequence)

    def abort(self, request_id: str) -> bool:
        """End a request early. Its last event has no token and reason ABORT.

        That is at once for a request that no iteration in flight contains, such as one that waits
        for a restore, and its event is returned by `take_events` or the next `commit`; otherwise it
        is when its last iteration in flight is committed.

        Returns:
            False if there is no such request, or it has finished already.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state is RequestState.FINISHED:
            return False
        now = self._clock()
        if sequence.slot >= 0:
            slot = sequence.slot
            sequence.end_restore(now)
            self._running.retire(slot)
            if self._running.in_flight[slot]:
                sequence.aborted = True
                return True
            self._keeper.free(slot)
        else:
            del self._queue[bisect.bisect_left(self._queue, sequence.arrival, key=_by_arrival)]
            self._keeper.forget(sequence)
        del self._sequences[request_id]
        self._events.append(sequence.final_event(now, None, FinishReason.ABORT))
        return True

    def take_events(self) -> list[TokenEvent]:
        """Events of aborts that took effect outside `commit`. Each event is handed out once."""
        events, self._events = self._events, []
        return events

    def schedule(self) -> Batch | None:
        """Choose the next iteration.

        Returns:
            None if nothing can run before another `commit`, or before a restore has ended. With
            iterations in flight, commit one. Without, and with `num_restoring` above 0, wait until
            the owner of the pages has brought something up, such as with a timeout of a few
            milliseconds, rather than call this again at once.
        """
        if self._running.num_restoring:
            self._keeper.end_restores()
        budget = self._config.max_num_batched_tokens
        decodes, prefills = self._running.ready()
        decodes, stalled = self._grow(decodes)
        budget -= len(decodes)  # never below 0: who starts gets a token beside all who run

        chunks: list[tuple[int, int]] = []
        for slot in prefills.tolist():
            if budget and self._running.alive[slot] and slot not in stalled:
                budget -= self._append_chunk(chunks, slot, budget)
        if not stalled:  # pages that come free now are for those who lack one
            self._admit(chunks, budget)
        if not len(decodes) and not chunks:
            return None
        batch = self._running.form_batch(self._num_iterations, decodes, chunks)
        self._num_iterations += 1
        self._in_flight.append(batch)
        return batch

    def commit(self, result: IterationResult) -> list[TokenEvent]:
        """Take the sampled ids of the oldest iteration in flight.

        Returns:
            An event for every token that a request keeps, in the order of the batch, and one for
            every request whose abort took effect since the last call.

        Raises:
            ValueError: `result` is not that of the oldest iteration in flight; nothing has changed.
        """
        batch = self._oldest_in_flight(result)
        self._in_flight.popleft()
        running, slots = self._running, batch.slots
        running.in_flight[slots] -= 1
        running.completed[slots] += batch.query_start[1:] - batch.query_start[:-1]
        alive = running.alive[slots]
        self._keeper.publish(slots[alive])

        now = self._clock()
        events = self.take_events()
        rows = np.flatnonzero(batch.samples & alive)
        sampled, tokens = slots[rows], result.token_ids[rows]
        running.pending[sampled] -= 1
        running.known[sampled] += 1
        running.last_token[sampled] = tokens
        for slot, token in zip(sampled.tolist(), tokens.tolist(), strict=True):
            events.append(self._take_token(slot, token, now))

        for slot in slots[~running.alive[slots] & (running.in_flight[slots] == 0)].tolist():
            sequence = running.sequence(slot)
            if sequence.aborted:
                events.append(sequence.final_event(now, None, FinishReason.ABORT))
            self._keeper.free(slot)
            del self._sequences[sequence.request_id]
        return events

    def check_integrity(self) -> None:
        """Compare everything the scheduler keeps twice, in time linear in the requests.

        Raises:
            RuntimeError: names the invariant that does not hold.
        """
        fault = find_fault(self._sequences, self._queue, self._running, self._in_flight)
        if fault is not None:
            raise RuntimeError(f"The scheduler's state is broken: {fault}.")

    def _grow(self, decodes: np.ndarray) -> tuple[np.ndarray, set[int]]:
        """Reserve a page for each of `decodes` that has filled its last one, oldest first.

        When there is none, the latest arrival is preempted. If an iteration in flight contains it,
        it is held back instead, such that it can be preempted soon, and those who lack a page wait.

        Returns:
            Those of `decodes` that can run, and the slots that must not run in this iteration.
        """
        running = self._running
        stalled: set[int] = set()
        needy = decodes[running.scheduled[decodes] >= running.capacity[decodes]]
        for slot in needy.tolist():
            if not running.alive[slot]:  # preempted for an older one
                continue
            if stalled:  # pages are out, and older ones come first
                stalled.add(slot)
                continue
            while not self._keeper.grow(slot):
                victim = running.latest_after(slot, idle=True)
                if victim is None:
                    held = running.latest_after(slot)
                    stalled.update((slot,) if held is None else (slot, held))
                    break
                self._preempt(victim)
        goes_on = running.alive[decodes]
        if stalled:
            goes_on &= ~np.isin(decodes, list(stalled))
        return decodes[goes_on], stalled

    def _preempt(self, slot: int) -> None:
        """Queue an idle request again, in order of arrival."""
        sequence = self._keeper.preempt(slot)
        self.num_preemptions += 1
        bisect.insort(self._queue, sequence, key=_by_arrival)

    def _admit(self, chunks: list[tuple[int, int]], budget: int) -> None:
        """Start queued requests, oldest first, until tokens, slots or pages are out.

        A request gets pages for all its known tokens at once, so that a prefill never stops for
        want of one. Those that are being restored do not run yet, but each will want a token of the
        budget beside all others.
        """
        running = self._running
        while budget > running.num_restoring and self._queue and running.has_free_slot:
            slot = self._keeper.start(self._queue[0])
            if slot is None:
                return
            del self._queue[0]
            if not running.restoring[slot]:
                budget -= self._append_chunk(chunks, slot, budget)

    def _append_chunk(self, chunks: list[tuple[int, int]], slot: int, budget: int) -> int:
        """Append (slot, tokens) for the next chunk of the prefill in `slot`; return its tokens."""
        running = self._running
        rest = int(running.known[slot] - running.scheduled[slot])
        count = min(rest, self._config.prefill_chunk, budget)
        chunks.append((slot, count))
        running.sequence(slot).ledger.prefill_chunks += 1
        return count

    def _oldest_in_flight(self, result: IterationResult) -> Batch:
        """The batch that `result` answers."""
        if not self._in_flight:
            raise ValueError(
                f"commit of iteration {result.iteration}: none is in flight; call schedule() first."
            )
        batch = self._in_flight[0]
        if result.iteration != batch.iteration:
            raise ValueError(
                f"commit of iteration {result.iteration}: expected {batch.iteration}; "
                "results are committed in the order of their batches."
            )
        if np.shape(result.token_ids) != (len(batch),):
            raise ValueError(
                f"token_ids of iteration {result.iteration} has shape "
                f"{np.shape(result.token_ids)}; expected ({len(batch)},), one entry per request."
            )
        return batch

    def _take_token(self, slot: int, token: int, now: float) -> TokenEvent:
        """Append a sampled token to the request in `slot`; retire the request if that ends it."""
        sequence = self._running.sequence(slot)
        request, output = sequence.request, sequence.output
        output.append(token)
        if len(output) == 1:
            sequence.ledger.first_token = now
        if token in request.stop_token_ids and len(output) >= request.min_tokens:
            self._running.retire(slot)
            return sequence.final_event(now, token, FinishReason.STOP, token)
        if len(output) == request.max_tokens:
            self._running.retire(slot)
            return sequence.final_event(now, token, FinishReason.LENGTH)
        return TokenEvent(request.request_id, token)
