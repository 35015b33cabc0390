"""A toy engine that distrusts the scheduler: it checks every batch and every event."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from nf_scheduler import (
    Admission,
    Batch,
    FinishReason,
    IterationResult,
    Policy,
    Request,
    RequestState,
    Scheduler,
    SchedulerConfig,
    TokenEvent,
)

VOCAB = 24


def next_token(history: list[int]) -> int:
    """The toy model: depends on every token before, and on nothing else."""
    digest = hashlib.blake2b(np.array(history, dtype=np.int32).tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected_output(request: Request) -> tuple[list[int], FinishReason]:
    """What the request generates when it is alone and nothing is batched."""
    history = request.prompt_token_ids.tolist()
    output: list[int] = []
    while True:
        token = next_token(history)
        history.append(token)
        output.append(token)
        if token in request.stop_token_ids and len(output) >= request.min_tokens:
            return output, FinishReason.STOP
        if len(output) == request.max_tokens:
            return output, FinishReason.LENGTH


@dataclass
class ToyMatch:
    token_ids: np.ndarray
    tokens_by_tier: dict[str, int]
    cache_salt: str

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def first(self, num_tokens: int) -> ToyMatch:
        on_device = min(num_tokens, self.tokens_by_tier["device"])
        tiers = {"device": on_device, "host": num_tokens - on_device}
        return ToyMatch(self.token_ids[:num_tokens], tiers, self.cache_salt)


class ToyPages:
    """A PageBudget that only counts. Neither tier of its prefix cache takes pages.

    What was committed can be found on the device, until its sequence is preempted: then it is only
    on the host.

    Args:
        page_size, num_pages: of the device.
        stored: prompts whose full pages are on the host at first.
        delay: () -> how many more times `restored` is asked in vain.
        arrives: tokens of a match that are not all on the device -> tokens of it that come.
        keeps: tokens that a preempted sequence has -> tokens of it that are kept.
    """

    def __init__(
        self,
        page_size: int,
        num_pages: int,
        stored: Iterable[np.ndarray] = (),
        delay: Callable[[], int] = lambda: 0,
        arrives: Callable[[int], int] = lambda num_tokens: num_tokens,
        keeps: Callable[[int], int] = lambda num_tokens: num_tokens,
    ):
        self.page_size = page_size
        self.num_pages = num_pages
        self.delay, self.arrives, self.keeps = delay, arrives, keeps
        self.pages: dict[str, int] = {}
        self.committed: dict[str, list[int]] = {}
        self.on_device: set[tuple[str, bytes]] = set()  # (salt, tokens) of full pages
        self.on_host: set[tuple[str, bytes]] = set()
        self.salts: dict[str, str] = {}  # of every sequence that has begun and not ended
        self.kept: dict[str, list[int]] = {}  # of each preempted sequence
        self.begun: dict[str, ToyMatch] = {}  # matches that `restored` has not answered
        self.left: dict[str, int] = {}  # how many times it will not
        self.answers: list[tuple[str, ToyMatch, int]] = []  # seq, its match, tokens that came
        self.preempted: list[tuple[str, int]] = []  # seq, tokens committed; in order
        self.departures: dict[str, int] = {}  # how often it gave up its pages
        self.releases: dict[str, int] = {}
        self.forks: list[tuple[str, str]] = []
        self.interrupted = 0  # restores that were under way at a preemption or release
        for prompt in stored:
            self._learn(self.on_host, "", prompt)

    @property
    def num_free(self) -> int:
        return self.num_pages - sum(self.pages.values())

    @property
    def num_available(self) -> int:
        return self.num_free

    def grow(self, seqs):
        assert len(set(seqs)) == len(seqs) <= self.num_free
        for seq in seqs:
            self.reserve(seq, self.pages[seq] * self.page_size + 1)

    def fork(self, parent, child, num_tokens):
        assert child not in self.pages
        assert parent not in self.begun
        assert num_tokens <= len(self.committed[parent])
        self.pages[child] = 0  # it shares none of the parent's, which is simple to count
        self.committed[child] = self.committed[parent][:num_tokens]
        self.salts[child] = self.salts[parent]
        self.forks.append((parent, child))

    def commit_pages(self, seqs, token_ids):
        assert token_ids.shape == (len(seqs), self.page_size)
        for seq, tokens in zip(seqs, token_ids, strict=True):
            assert len(self.committed[seq]) % self.page_size == 0
            self.commit(seq, tokens)

    def match(self, token_ids, *, seq="", cache_salt=""):
        def extend(stop, *tiers):
            while stop + self.page_size <= len(token_ids) and (
                cache_salt,
                token_ids[: stop + self.page_size].tobytes(),
            ) in set().union(*tiers):
                stop += self.page_size
            return stop

        on_device = extend(0, self.on_device)
        found = extend(on_device, self.on_device, self.on_host)
        kept = self.kept.get(seq, [])
        assert kept == token_ids[: len(kept)].tolist(), "kept for another sequence of that name"
        tiers = {"device": on_device, "host": len(token_ids) - on_device}
        whole = ToyMatch(token_ids, tiers, cache_salt)
        return whole.first(max(found, len(kept)))

    def can_reserve(self, seq, num_tokens, match=None):
        return self._missing(seq, num_tokens) <= self.num_free

    def reserve(self, seq, num_tokens, match=None):
        missing = self._missing(seq, num_tokens)
        if missing > self.num_free:
            raise RuntimeError("out of pages")
        if seq not in self.pages:
            self.committed[seq] = []
            self.salts[seq] = "" if match is None else match.cache_salt
            if match is not None:
                assert match.num_tokens < num_tokens
                self.begun[seq] = match
                self.left[seq] = self.delay() if match.tokens_by_tier["host"] else 0
        self.pages[seq] = self.pages.get(seq, 0) + missing

    def restored(self, seq):
        if self.left[seq]:
            self.left[seq] -= 1
            return None
        del self.left[seq]
        match = come = self.begun.pop(seq)
        if match.tokens_by_tier["host"]:
            come = match.first(self.arrives(match.num_tokens))
        self.answers.append((seq, match, come.num_tokens))
        self.kept.pop(seq, None)
        self.committed[seq] = come.token_ids.tolist()
        self._learn(self.on_device, self.salts[seq], come.token_ids)
        return come

    def commit(self, seq, token_ids):
        assert len(token_ids)
        assert seq not in self.begun
        history = self.committed[seq]
        history.extend(token_ids.tolist())
        assert len(history) <= self.pages[seq] * self.page_size
        self._learn(self.on_device, self.salts[seq], np.array(history, dtype=np.int32))

    def preempt(self, seq):
        tokens = np.array(self.committed[seq], dtype=np.int32)
        if seq in self.begun:
            assert not len(tokens)
        else:
            self.preempted.append((seq, len(tokens)))
            self.kept[seq] = tokens[: self.keeps(len(tokens))].tolist()
            for stop in range(self.page_size, len(tokens) + 1, self.page_size):
                self.on_device.discard((self.salts[seq], tokens[:stop].tobytes()))
        self._take_pages(seq)

    def release(self, seq):
        del self.salts[seq]  # KeyError: released twice, or never begun
        self.kept.pop(seq, None)
        if seq in self.pages:
            self._take_pages(seq)
        self.releases[seq] = self.releases.get(seq, 0) + 1

    def _take_pages(self, seq):
        del self.pages[seq], self.committed[seq]
        if self.begun.pop(seq, None) is not None:
            del self.left[seq]
            self.interrupted += 1
        self.departures[seq] = self.departures.get(seq, 0) + 1

    def _learn(self, tier, salt, token_ids):
        for stop in range(self.page_size, len(token_ids) + 1, self.page_size):
            tier.add((salt, token_ids[:stop].tobytes()))

    def _missing(self, seq, num_tokens):
        return max(0, -(-num_tokens // self.page_size) - self.pages.get(seq, 0))


@dataclass
class Life:
    """What the engine knows of a request."""

    request: Request
    arrival: int
    history: list[int]  # prompt and everything sampled on the device, speculation included
    kv: int = 0  # tokens in pages
    slot: int | None = None
    departures: int = 0  # how often it had given up its pages when it was last started
    waits_since: float | None = None  # for a restore
    restore_seconds: float = 0.0
    cached_tokens: int = 0
    restored_tokens: int = 0
    received: list[int] = field(default_factory=list)
    end: TokenEvent | None = None
    sampled_at: dict[int, int] = field(default_factory=dict)  # position -> iteration
    starts: int = 0

    @property
    def prompt_len(self) -> int:
        return self.request.prompt_len


class ToyEngine:
    """Runs a scheduler `lag` iterations ahead of its results, and checks all it does."""

    def __init__(self, pages, config: SchedulerConfig, lag: int = 0, **parts):
        self.pages = pages
        self.config = config
        self.lag = lag
        self.now = 0.0
        parts = {"admission": Admission()} | parts
        self.policy = parts.get("policy")
        self.tenants: set[str] = set()
        self.scheduler = Scheduler(pages, config, clock=lambda: self.now, **parts)
        self.lives: dict[str, Life] = {}
        self.in_flight: deque[tuple[Batch, np.ndarray]] = deque()
        self.committed = -1  # last committed iteration
        self.batches: list[Batch] = []
        self.waits = 0  # schedules since the oldest request last ran
        self.partial_returns = 0  # starts in the middle of a page
        self.decode_returns = 0  # starts with all KV but that of the last token
        self.num_answers = self.num_preempted = 0  # of those the pages list, how many were checked

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.tenants.add(request.tenant)
        history = request.prompt_token_ids.tolist()
        self.lives[request.request_id] = Life(request, len(self.lives), history)

    def abort(self, request_id: str) -> bool:
        expected = self.lives[request_id].end is None and not self._is_finished(request_id)
        alive = self.scheduler.abort(request_id)
        assert alive == expected
        self._check_restores()
        self.scheduler.check_integrity()
        self._take(self.scheduler.take_progress())
        return alive

    def step(self) -> None:
        """Schedule once; commit what is too old, or what stands in the way."""
        self.now += 1.0
        oldest = self._oldest_running()
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self._check_pages()
        self._check_restores()
        self._take(self.scheduler.take_progress())  # deadlines that have passed
        if batch is None and not self.in_flight and self.scheduler.has_work:
            assert self.scheduler.num_restoring, "nothing runs, and nothing is waited for"
        if batch is not None:
            self._check_batch(batch)
            self.batches.append(batch)
            self.in_flight.append((batch, self._run(batch)))
        self._check_progress(oldest, batch)
        if len(self.in_flight) > self.lag or (batch is None and self.in_flight):
            self.commit()

    def commit(self) -> list[TokenEvent]:
        self.now += 1.0
        batch, token_ids = self.in_flight.popleft()
        self.committed = batch.iteration
        events = self.scheduler.commit(IterationResult(batch.iteration, token_ids))
        self.scheduler.check_integrity()
        self._take(events)
        return events

    def run(self, max_steps: int = 20_000) -> None:
        """Step until everything has ended."""
        while self.scheduler.has_work:
            max_steps -= 1
            assert max_steps, "the engine does not come to an end"
            self.step()
        assert not self.in_flight
        self.check_end()

    def check_end(self) -> None:
        assert all(life.end is not None for life in self.lives.values())
        assert self.pages.num_free == self.pages.num_pages
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.scheduler.num_restoring == 0
        left = (self.pages.salts, self.pages.kept, self.pages.begun, self.pages.left)
        assert left == ({}, {}, {}, {}), "a sequence did not end"
        assert not self.scheduler.take_progress()

    def _is_finished(self, request_id: str) -> bool:
        try:
            return self.scheduler.state_of(request_id) is RequestState.FINISHED
        except KeyError:
            return True

    def _run(self, batch: Batch) -> np.ndarray:
        """The device: sample for every request of the batch; ids stay in `history` from now on."""
        token_ids = np.full(len(batch), -7, dtype=np.int32)  # garbage where nothing is sampled
        for row, request_id in enumerate(batch.request_ids):
            life = self.lives[request_id]
            life.kv = int(batch.context_lens[row] + np.diff(batch.query_start)[row])
            if batch.samples[row]:
                token_ids[row] = next_token(life.history[: life.kv])
                assert life.kv == len(life.history)
                life.sampled_at[life.kv] = batch.iteration
                life.history.append(int(token_ids[row]))
        return token_ids

    def _check_batch(self, batch: Batch) -> None:
        n, config = len(batch), self.config
        assert batch.iteration == len(self.batches)
        assert 1 <= n <= config.max_num_seqs
        limit = config.budget_for(batch.num_decodes).num_tokens
        assert 1 <= batch.num_tokens <= max(limit, batch.num_decodes)
        assert batch.num_tokens <= config.max_num_batched_tokens
        assert batch.query_start[0] == 0
        assert batch.query_start[-1] == batch.num_tokens
        for name in ("slots", "query_start", "context_lens", "token_ids"):
            assert getattr(batch, name).dtype == np.int32
        assert batch.samples.dtype == np.bool_
        assert len(set(batch.request_ids)) == len(set(batch.slots.tolist())) == n
        assert Batch.from_bytes(batch.to_bytes()) == batch
        decodes = [self._place(name) for name in batch.request_ids[: batch.num_decodes]]
        assert decodes == sorted(decodes)
        for row in range(n):
            self._check_row(batch, row)

    def _check_row(self, batch: Batch, row: int) -> None:
        life = self.lives[batch.request_ids[row]]
        request_id = life.request.request_id
        slot, start = int(batch.slots[row]), int(batch.context_lens[row])
        new = batch.token_ids[batch.query_start[row] : batch.query_start[row + 1]].tolist()
        stop = start + len(new)
        assert life.end is None
        assert self.scheduler.state_of(request_id) is RequestState.RUNNING
        assert 0 <= slot < self.config.max_num_seqs
        departures = self.pages.departures.get(request_id, 0)
        if life.slot is None or departures > life.departures:  # a start, or a return
            assert start == len(self.pages.committed[request_id])
            if start % self.pages.page_size:
                is_fork = any(child == request_id for _, child in self.pages.forks)
                assert life.starts or is_fork, "a partial page of another request"
                self.partial_returns += bool(life.starts)
            if not life.starts and any(child == request_id for _, child in self.pages.forks):
                life.cached_tokens = start
            self.decode_returns += row < batch.num_decodes
            assert life.request.reuse_prefix or start == 0
            assert not any(request_id in other.request_ids for other, _ in self.in_flight)
            self._check_is_next(life)
            life.slot, life.departures, life.starts = slot, departures, life.starts + 1
        else:
            assert start == life.kv, "chunks do not tile the request"
        assert slot == life.slot, "the slot of a running request changed"
        users = {
            b.request_ids[b.slots.tolist().index(slot)]
            for b, _ in self.in_flight
            if slot in b.slots
        }
        assert users <= {request_id}, "the slot is still in use"

        assert stop <= self.pages.pages[request_id] * self.pages.page_size
        assert stop <= len(life.history)
        assert len(life.history) - life.prompt_len < life.request.max_tokens
        assert bool(batch.samples[row]) == (stop == len(life.history))
        for position, token in enumerate(new, start):
            unknown = life.sampled_at.get(position, -1) > self.committed
            assert token == (-1 if unknown else life.history[position])
        if row < batch.num_decodes:
            assert len(new) == 1
            assert start >= life.prompt_len
        else:
            assert 1 <= len(new) <= self.config.budget_for(batch.num_decodes).prefill_chunk

    def _check_pages(self) -> None:
        """What the pages were told of is true, and who was preempted left all the KV it had."""
        for name, salt in self.pages.salts.items():
            assert salt == self.lives[name].request.cache_salt
        for name, tokens in self.pages.committed.items():
            assert tokens == self.lives[name].history[: len(tokens)]
        for name, num_tokens in self.pages.preempted[self.num_preempted :]:
            life = self.lives[name]
            ran = life.starts and life.departures == self.pages.departures[name] - 1
            assert not ran or num_tokens == life.kv
        self.num_preempted = len(self.pages.preempted)

    def _check_restores(self) -> None:
        """Keep the time that each request waits, and what it reuses, for `_check_ledger`."""
        for name, _, come in self.pages.answers[self.num_answers :]:
            life = self.lives[name]
            if life.starts:
                life.restored_tokens += come
            else:
                life.cached_tokens = come
        self.num_answers = len(self.pages.answers)
        restoring = 0
        for name, life in self.lives.items():
            waits = name in self.pages.begun
            if life.end is None and not self._is_finished(name):
                state = self.scheduler.state_of(name)
                assert (state is RequestState.WAITING_FOR_RESTORE) == waits
            restoring += waits
            if waits and life.waits_since is None:
                life.waits_since = self.now
            elif not waits and life.waits_since is not None:
                life.restore_seconds += self.now - life.waits_since
                life.waits_since = None
        assert self.scheduler.num_restoring == restoring

    def _oldest_running(self) -> str | None:
        """The first request with pages, if it runs and has something to compute."""
        alive = [
            name
            for name, life in self.lives.items()
            if life.end is None and not self._is_finished(name)
        ]
        for name in sorted(alive, key=self._place):
            life = self.lives[name]
            state = self.scheduler.state_of(name)
            if state is RequestState.WAITING_FOR_RESTORE:
                return None  # it goes on in time, and until then others may lack its pages
            if (
                state is RequestState.RUNNING
                and len(life.history) - life.prompt_len < life.request.max_tokens
            ):
                return name
        return None

    def _check_progress(self, oldest: str | None, batch: Batch | None) -> None:
        """The oldest running request goes on, save for short waits for iterations in flight.

        Its prefill also waits while decodes alone fill the budget.
        """
        if oldest is None or (batch is not None and oldest in batch.request_ids):
            self.waits = 0
        elif batch is None or batch.num_decodes < self.config.max_num_batched_tokens:
            self.waits += 1
        assert self.waits <= 2 * (self.lag + 1) * (self.config.max_num_seqs + 1), "starvation"

    def _place(self, name: str) -> tuple[float, int]:
        """Where the scheduler ranks a request."""
        return self.scheduler._sequences[name].place

    def _check_is_next(self, life: Life) -> None:
        """When a request first runs, none that comes before it is queued.

        That holds for first come, first served; others may change ranks, and tenants take turns.
        """
        if type(self.policy) not in (type(None), Policy) or len(self.tenants) > 1:
            return
        if life.request.fork_of is not None:
            return
        for name, other in self.lives.items():
            if other.arrival < life.arrival and not self._is_finished(name):
                waits_for_prompt = other.request.fork_of is not None
                assert waits_for_prompt or self.scheduler.state_of(name) in (
                    RequestState.RUNNING,
                    RequestState.WAITING_FOR_RESTORE,
                )

    def _take(self, events: list[TokenEvent]) -> None:
        for event in events:
            life = self.lives[event.request_id]
            assert life.end is None, "an event after the last"
            if event.token_id is None:
                assert event.finish_reason in (FinishReason.ABORT, FinishReason.TIMEOUT)
            else:
                life.received.append(event.token_id)
                expected, reason = expected_output(life.request)
                assert life.received == expected[: len(life.received)]
                ends = len(life.received) == len(expected)
                assert event.finish_reason == (reason if ends else None)
                stopped = event.finish_reason is FinishReason.STOP
                assert event.stop_token == (event.token_id if stopped else None)
            if event.finish_reason is not None:
                life.end = event
                self._check_ledger(life)
            else:
                assert event.ledger is None

    def _check_ledger(self, life: Life) -> None:
        ledger = life.end.ledger
        assert ledger.prompt_tokens == life.prompt_len
        assert ledger.output_tokens == len(life.received)
        assert ledger.finished == self.now
        assert ledger.cached_tokens == life.cached_tokens < life.prompt_len
        assert sum(ledger.cached_tokens_by_tier.values()) == life.cached_tokens
        assert ledger.restored_tokens == life.restored_tokens
        assert ledger.restore_seconds == life.restore_seconds
        times = [ledger.arrival, ledger.first_scheduled, ledger.first_token, ledger.finished]
        known = [time for time in times if time is not None]
        assert known == sorted(known)
        assert (ledger.first_token is None) == (not life.received)
        if life.starts:
            assert life.starts <= ledger.preemptions + 1
            assert ledger.prefill_chunks >= 1


@pytest.fixture(scope="session")
def toy():
    """The toy engine and its parts."""
    return SimpleNamespace(
        Engine=ToyEngine, Pages=ToyPages, expected_output=expected_output, VOCAB=VOCAB
    )
