"""Continuous batching with chunked prefill, in the order that a policy says."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from nf_scheduler.admission import Admission, PredictedPeak
from nf_scheduler.batch import Batch
from nf_scheduler.config import SchedulerConfig, TokenBudget
from nf_scheduler.errors import QueueFull
from nf_scheduler.integrity import find_fault
from nf_scheduler.output_lengths import OutputLengths
from nf_scheduler.page_budget import PageBudget
from nf_scheduler.page_keeper import PageKeeper
from nf_scheduler.policy import Policy, PolicyFacts
from nf_scheduler.request import FinishReason, Request, RequestState
from nf_scheduler.result import IterationResult, Progress
from nf_scheduler.running_set import RunningSet
from nf_scheduler.sequence import Sequence
from nf_scheduler.stats import SchedulerStats
from nf_scheduler.tenant_shares import TenantShares
from nf_scheduler.waiting_queue import WaitingQueue

_RERANKED_AT_ONCE = 32  # queued requests whose rank is looked at again in one iteration
_REFUSAL_ITERATIONS = 8  # so long a refused admission stands, unless something changes


class Scheduler:
    """Decides which tokens of which requests every iteration computes.

    `schedule` may run ahead of `commit`, by any number of iterations. It then schedules the next
    token of a request whose last token is not known yet as -1. If that request turns out to have
    finished, whatever later iterations in flight sample for it is dropped, and its pages and slot
    are freed once, when the last of them has been committed.

    A request whose prefix is in a lower tier gets its slot and pages and waits until the prefix is
    restored; later ones start meanwhile. What does not come is computed.

    When pages run out, the request that the policy ranks last gives up its own and returns later;
    what it has generated stays, and what is not kept of its KV is computed again. The first in rank
    always goes on: its pages are never taken, and a restore ends. Not thread-safe.

    Args:
        pages: who owns the KV pages; used by this scheduler alone.
        config: limits of an iteration and of the queue.
        policy: who goes first; by default who came first.
        admission: whether there are pages for one more; by default by the predicted peak.
        lengths: how long answers get; by default learned from here on.
        clock: seconds, for ranks, deadlines and ledgers.

    Attributes:
        num_preemptions: how often a request gave up its pages, so far.
        lengths: how long answers get.
    """

    def __init__(
        self,
        pages: PageBudget,
        config: SchedulerConfig,
        *,
        policy: Policy | None = None,
        admission: Admission | None = None,
        lengths: OutputLengths | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_preemptions = 0
        self.lengths = lengths or OutputLengths(config.max_model_len)
        self._pages = pages
        self._config = config
        self._policy = policy or Policy()
        self._admission = admission or PredictedPeak(self.lengths, config.max_model_len)
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}  # all that are queued or have a slot
        self._shares = TenantShares()
        self._queue = WaitingQueue(self._shares)
        self._forks: dict[str, list[Sequence]] = {}  # by parent, those that wait for its prompt
        self._rerank: deque[Sequence] = deque()  # queued, whose turn it is to be ranked again
        self._deadlines: list[tuple[float, int, str]] = []  # a heap, with some that have ended
        self._running = RunningSet(config.max_num_seqs, pages.page_size)
        self._keeper = PageKeeper(pages, self._running, clock)
        self._facts = PolicyFacts(self.lengths, self._keeper.count_cached)
        self._in_flight: deque[Batch] = deque()
        self._untold = Progress()  # of requests that ended outside of `commit`
        self._num_arrivals = 0
        self._num_iterations = 0
        self._num_refused = 0
        self._num_timeouts = 0
        self._last_commit = clock()
        self._launched: deque[float] = deque()  # when the iterations in flight were scheduled
        self._refused: Sequence | None = None  # who was not admitted
        self._refused_until = 0  # the iteration that asks again

    @property
    def has_work(self) -> bool:
        """Whether some request has not finished, or iterations are in flight."""
        return bool(self._sequences or self._in_flight)

    @property
    def in_flight(self) -> list[Batch]:
        """Iterations that were scheduled and not committed, oldest first."""
        return list(self._in_flight)

    @property
    def num_waiting(self) -> int:
        """Requests that are queued, for the first time or again, or being restored."""
        return self._num_queued + self._running.num_restoring

    @property
    def num_restoring(self) -> int:
        """Those of `num_waiting` that have pages and a slot, and wait for KV from a lower tier."""
        return self._running.num_restoring

    @property
    def num_running(self) -> int:
        """Requests that take part in iterations."""
        return self._running.num_running

    @property
    def stats(self) -> SchedulerStats:
        """Where it stands, and what happened so far."""
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_restoring=self.num_restoring,
            queued_prompt_tokens=self._queue.num_prompt_tokens,
            tenants=len(self._shares),
            preemptions=self.num_preemptions,
            refused=self._num_refused,
            timeouts=self._num_timeouts,
        )

    def set_budgets(self, budgets: tuple[TokenBudget, ...]) -> None:
        """Form batches by other budgets, from the next one on.

        Args:
            budgets: as `SchedulerConfig.budgets`.

        Raises:
            ValueError: they are out of order or above the limit; nothing has changed.
        """
        self._config = replace(self._config, budgets=budgets)

    def is_in_flight(self, request_id: str) -> bool:
        """Whether an iteration in flight contains a request of that name, finished or not."""
        return any(request_id in batch.request_ids for batch in self._in_flight)

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
            QueueFull: so many are queued already that it is not taken; nothing has changed.
            ValueError: the id is in use, or the request is longer than the model's context or than
                all pages.
        """
        self._check(request)
        parent = self._sequences.get(request.fork_of or "")
        if parent is not None and not request.can_fork(parent.request):
            parent = None
        sequence = Sequence(request, self._num_arrivals, self._clock())
        self._num_arrivals += 1
        sequence.rank = self._policy.rank(sequence, self._facts)
        self._sequences[request.request_id] = sequence
        self._shares.enter(request.tenant)
        if request.deadline is not None:
            heapq.heappush(
                self._deadlines, (request.deadline, sequence.arrival, request.request_id)
            )
        if parent is None or self._keeper.has_computed_prompt(parent):
            self._enqueue(sequence)
        else:
            self._forks.setdefault(parent.request_id, []).append(sequence)

    def abort(self, request_id: str) -> bool:
        """End a request early, without another token. Its reason is ABORT.

        That is at once for a request that no iteration in flight contains, such as one that waits
        for a restore, and its end is returned by `take_progress` or the next `commit`; otherwise it
        is when its last iteration in flight is committed.

        Returns:
            False if there is no such request, or it has finished already.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state is RequestState.FINISHED:
            return False
        self._end_early(sequence, FinishReason.ABORT, self._clock())
        return True

    def take_progress(self) -> Progress:
        """The requests that ended outside of `commit`. Each end is handed out once."""
        untold, self._untold = self._untold, Progress()
        return untold

    def schedule(self) -> Batch | None:
        """Choose the next iteration.

        Returns:
            None if nothing can run before another `commit`, or before a restore has ended. With
            iterations in flight, commit one. Without, and with `num_restoring` above 0, wait until
            the owner of the pages has brought something up, such as with a timeout of a few
            milliseconds, rather than call this again at once.
        """
        now = self._clock()
        self._end_overdue(now)
        if self._running.num_restoring:
            self._keeper.end_restores()
        decodes, prefills = self._running.ready()
        decodes, stalled = self._grow(decodes)
        limits = self._config.budget_for(len(decodes))
        # Never below 0: who starts gets a token beside all who run.
        budget = max(0, limits.num_tokens - len(decodes))
        if budget and (len(prefills) or len(self._queue)):
            budget = self._policy.prefill_tokens(self._running, decodes, budget, now)

        chunks: list[tuple[int, int]] = []
        for slot in prefills.tolist():
            if budget and self._running.alive[slot] and slot not in stalled:
                budget -= self._append_chunk(chunks, slot, min(budget, limits.prefill_chunk))
        if budget and not stalled and len(self._queue):  # pages are for those who lack one first
            self._admit(chunks, budget, limits.prefill_chunk)
        if not len(decodes) and not chunks:
            return None
        batch = self._running.form_batch(self._num_iterations, decodes, chunks)
        if len(self._shares) > 1:
            self._shares.charge(
                self._running.tenant[batch.slots], np.diff(batch.query_start), batch.num_decodes
            )
        self._num_iterations += 1
        self._in_flight.append(batch)
        self._launched.append(now)
        return batch

    def commit(self, result: IterationResult) -> Progress:
        """Take the sampled ids of the oldest iteration in flight.

        Returns:
            Every token that a request keeps, in the order of the batch, and every request that
            ended since the last call.

        Raises:
            ValueError: `result` is not that of the oldest iteration in flight; nothing has changed.
        """
        batch = self._oldest_in_flight(result)
        self._in_flight.popleft()
        now = self._clock()
        began = max(self._launched.popleft(), self._last_commit)
        self._last_commit = now
        self._policy.observe(batch.num_decodes, batch.num_tokens - batch.num_decodes, now - began)

        running, slots = self._running, batch.slots.astype(np.intp)
        running.in_flight[slots] -= 1
        running.completed[slots] += batch.query_start[1:] - batch.query_start[:-1]
        alive = running.alive[slots]
        self._keeper.publish(slots[alive])
        rows = (batch.samples & alive).nonzero()[0]
        progress = self._take_tokens(batch, rows, slots[rows], result, now)
        if self._forks:
            self._release_forks(batch.request_ids[batch.num_decodes :])
        if not running.num_retired:
            return progress
        gone = slots[~running.alive[slots] & (running.in_flight[slots] == 0)]
        for slot in gone.tolist():
            sequence = running.sequence(slot)
            if sequence.ending is not None:
                progress.ends[sequence.request_id] = sequence.end(now, sequence.ending)
            self._keeper.free(slot)
            self._forget(sequence)
        return progress

    def check_integrity(self) -> None:
        """Compare everything the scheduler keeps twice, in time linear in the requests.

        Raises:
            RuntimeError: names the invariant that does not hold.
        """
        forks = [fork for forks in self._forks.values() for fork in forks]
        fault = find_fault(self._sequences, self._queue, forks, self._running, self._in_flight)
        if fault is not None:
            raise RuntimeError(f"The scheduler's state is broken: {fault}.")

    # Coming and going

    def _check(self, request: Request) -> None:
        """Refuse what can never run, and what the queue has no room for."""
        name = request.request_id
        if name in self._sequences:
            raise ValueError(f"request_id {name!r} is in use; give every request its own.")
        total = request.prompt_len + request.max_tokens
        if total > self._config.max_model_len:
            raise ValueError(
                f"Request {name!r} may reach {total} tokens ({request.prompt_len} of "
                f"the prompt and max_tokens={request.max_tokens}), and max_model_len is "
                f"{self._config.max_model_len}. Shorten the prompt or lower max_tokens."
            )
        # The KV of the last token is never computed.
        needed = -(-(total - 1) // self._pages.page_size)
        if needed > self._pages.num_pages:
            raise ValueError(
                f"Request {name!r} may reach {total} tokens, which take {needed} "
                f"pages, and the KV cache has {self._pages.num_pages}. Lower max_tokens, or give "
                "the cache more memory."
            )
        fault = self._queue_fault(request)
        if fault is not None:
            self._num_refused += 1
            raise QueueFull(f"Request {name!r} is not taken: {fault}. Try again later.")

    def _queue_fault(self, request: Request) -> str | None:
        """Why the queue has no room for a request."""
        queued, most = self._num_queued, self._config.max_queued_requests
        if most is not None and queued >= most:
            return f"{queued} requests are queued, and max_queued_requests is {most}"
        tokens, most = self._queue.num_prompt_tokens, self._config.max_queued_tokens
        if most is not None and tokens and tokens + request.prompt_len > most:
            return (
                f"the queue holds prompts of {tokens} tokens, this one has {request.prompt_len}, "
                f"and max_queued_tokens is {most}"
            )
        return None

    @property
    def _num_queued(self) -> int:
        return len(self._queue) + sum(len(forks) for forks in self._forks.values())

    def _enqueue(self, sequence: Sequence) -> None:
        self._queue.add(sequence)
        if self._policy.reranks:
            self._rerank.append(sequence)

    def _end_overdue(self, now: float) -> None:
        """End the requests whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, arrival, request_id = heapq.heappop(self._deadlines)
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.arrival != arrival:  # another one of that name
                continue
            if sequence.state is not RequestState.FINISHED:
                self._num_timeouts += 1
                self._end_early(sequence, FinishReason.TIMEOUT, now)

    def _end_early(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        """End a request that has not finished; at once, if no iteration in flight contains it."""
        slot = sequence.slot
        if slot >= 0:
            sequence.end_restore(now)
            self._running.retire(slot)
            if self._running.in_flight[slot]:
                sequence.ending = reason
                return
            self._keeper.free(slot)
        else:
            forks = self._forks.get(sequence.request.fork_of or "", [])
            if sequence in forks:
                forks.remove(sequence)
            else:
                self._queue.remove(sequence)
            self._keeper.forget(sequence)
        self._forget(sequence)
        self._untold.ends[sequence.request_id] = sequence.end(now, reason)

    def _forget(self, sequence: Sequence) -> None:
        """Drop a request that has no slot any more. Who waits for its prompt computes its own."""
        self._refused = None
        sequence.state = RequestState.FINISHED
        del self._sequences[sequence.request_id]
        self._shares.leave(sequence.request.tenant)
        for fork in self._forks.pop(sequence.request_id, ()):
            self._enqueue(fork)

    def _release_forks(self, request_ids: list[str]) -> None:
        """Queue those who wait for the prompt of a request that has just computed it."""
        for request_id in request_ids:
            parent = self._sequences[request_id]
            if request_id in self._forks and self._keeper.has_computed_prompt(parent):
                for fork in self._forks.pop(request_id):
                    self._enqueue(fork)

    # Pages

    def _grow(self, decodes: np.ndarray) -> tuple[np.ndarray, set[int]]:
        """Reserve a page for each of `decodes` that has filled its last one, in order.

        When there is none, the last in order is preempted. If an iteration in flight contains it,
        it is held back instead, such that it can be preempted soon, and those who lack a page wait.

        Returns:
            Those of `decodes` that can run, and the slots that must not run in this iteration.
        """
        running = self._running
        stalled: set[int] = set()
        needy = decodes[running.scheduled[decodes] >= running.capacity[decodes]]
        if not len(needy) or self._keeper.grow(needy):
            return decodes, stalled
        for row, slot in enumerate(needy.tolist()):
            if not running.alive[slot]:  # preempted for one before it
                continue
            if stalled:  # pages are out, and those before it come first
                stalled.add(slot)
                continue
            while not self._keeper.grow(needy[row : row + 1]):
                victim = running.last_after(slot, idle=True)
                if victim is None:
                    held = running.last_after(slot)
                    stalled.update((slot,) if held is None else (slot, held))
                    break
                self._preempt(victim)
        goes_on = running.alive[decodes]
        if stalled:
            goes_on &= ~np.isin(decodes, list(stalled))
        return decodes[goes_on], stalled

    def _preempt(self, slot: int) -> None:
        """Queue an idle request again, where its rank says."""
        self._refused = None
        self.num_preemptions += 1
        self._queue.add(self._keeper.preempt(slot))

    def _admit(self, chunks: list[tuple[int, int]], budget: int, prefill_chunk: int) -> None:
        """Start queued requests in order, until tokens, slots or pages are out.

        A request gets pages for all its known tokens at once, so that a prefill never stops for
        want of one. Those that are being restored do not run yet, but each will want a token of the
        budget beside all others.
        """
        running = self._running
        if not running.has_free_slot:
            return
        if self._policy.reranks:
            self._rank_again()
        if self._is_refused(self._queue.head()):
            return
        self._admission.begin(running, self._pages)
        while budget > running.num_restoring and running.has_free_slot:
            sequence = self._queue.head()
            if sequence is None:
                return
            # Whoever is alone is not kept waiting by a prediction.
            if running.alive.any() and not self._admission.admits(sequence):
                self._refused = sequence
                self._refused_until = self._num_iterations + _REFUSAL_ITERATIONS
                return
            tenant = self._shares.index(sequence.request.tenant)
            slot = self._keeper.start(sequence, tenant, self._fork_parent(sequence))
            if slot is None:
                return
            self._queue.remove(sequence)
            self._admission.started(sequence)
            self._policy.started(slot, sequence)
            if not running.restoring[slot]:
                budget -= self._append_chunk(chunks, slot, min(budget, prefill_chunk))

    def _is_refused(self, sequence: Sequence | None) -> bool:
        """Whether a request was not admitted, and nothing has changed since.

        Predicting costs time, and little changes while the same requests run.
        """
        if sequence is not self._refused or self._num_iterations >= self._refused_until:
            self._refused = None
        return self._refused is not None

    def _fork_parent(self, sequence: Sequence) -> Sequence | None:
        """Whose prompt's pages a request can begin with."""
        parent = self._sequences.get(sequence.request.fork_of or "")
        if parent is None or sequence.output or not self._keeper.has_computed_prompt(parent):
            return None
        return parent if sequence.request.can_fork(parent.request) else None

    def _rank_again(self) -> None:
        """Look again at the ranks of some queued requests, in turn."""
        for _ in range(min(_RERANKED_AT_ONCE, len(self._rerank))):
            sequence = self._rerank.popleft()
            if sequence.state is not RequestState.WAITING:
                continue
            rank = self._policy.rank(sequence, self._facts)
            if rank != sequence.rank:
                self._queue.remove(sequence)
                sequence.rank = rank
                self._queue.add(sequence)
            self._rerank.append(sequence)

    def _append_chunk(self, chunks: list[tuple[int, int]], slot: int, most: int) -> int:
        """Append (slot, tokens) for the next chunk of the prefill in `slot`; return its tokens."""
        running = self._running
        count = min(int(running.known[slot] - running.scheduled[slot]), most)
        chunks.append((slot, count))
        running.sequence(slot).ledger.prefill_chunks += 1
        return count

    # Results

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

    def _take_tokens(
        self,
        batch: Batch,
        rows: np.ndarray,
        slots: np.ndarray,
        result: IterationResult,
        now: float,
    ) -> Progress:
        """Append the tokens of some rows of a batch; retire the requests that they end."""
        running = self._running
        tokens = np.asarray(result.token_ids)[rows].astype(np.int32, copy=False)
        stopped, full = running.take_tokens(slots, tokens)
        lengths = running.known[slots] - running.prompt_len[slots]
        self.lengths.observe_tokens(lengths)
        first = slots[lengths == 1]
        running.first_token[first] = now
        for slot in first.tolist():
            running.sequence(slot).ledger.first_token = now

        progress = self.take_progress()
        ids = batch.request_ids
        progress.request_ids = (
            list(ids) if len(rows) == len(ids) else [ids[row] for row in rows.tolist()]
        )
        progress.token_ids = tokens.tolist()
        for row in (stopped | full).nonzero()[0].tolist():
            sequence = running.sequence(int(slots[row]))
            running.retire(sequence.slot)
            if stopped[row]:
                self.lengths.observe_end(int(lengths[row]))
                end = sequence.end(now, FinishReason.STOP, progress.token_ids[row])
            else:
                end = sequence.end(now, FinishReason.LENGTH)
            progress.ends[sequence.request_id] = end
        return progress
