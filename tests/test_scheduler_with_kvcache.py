"""nf-scheduler on the pages of nf-kvcache, under a device that knows only what is in the pages.

The toy model's next token is a hash of all tokens before it, and it reads those from the K of the
pages. A page that is shared wrongly, taken too early, or not written at all changes a token.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_kvcache import KVCache, KVLayout
from nf_scheduler import (
    Admission,
    Batch,
    FinishReason,
    IterationResult,
    PageBudget,
    Request,
    RequestState,
    Scheduler,
    SchedulerConfig,
)

VOCAB = 50
STOPS = frozenset({0})


def next_token(history: list[int]) -> int:
    digest = hashlib.blake2b(np.array(history, dtype=np.int32).tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def generate_alone(request: Request) -> list[int]:
    history = request.prompt_token_ids.tolist()
    while True:
        history.append(next_token(history))
        output = history[request.prompt_len :]
        if output[-1] in request.stop_token_ids or len(output) == request.max_tokens:
            return output


class PagedDevice:
    """K holds token ids, V their positions. The last sampled id of every slot stays here."""

    def __init__(self, cache: KVCache, num_slots: int):
        self.cache = cache
        self.last_sampled = np.full(num_slots, -1, dtype=np.int32)

    def run(self, batch: Batch) -> np.ndarray:
        tables = self.cache.page_tables(batch.request_ids)
        ends = batch.context_lens + np.diff(batch.query_start)
        keys, values = self.cache.layers[0]
        for row, slot in enumerate(batch.slots):
            new = batch.token_ids[batch.query_start[row] : batch.query_start[row + 1]]
            new = np.where(new == -1, self.last_sampled[slot], new)
            pages, offsets = self.where(tables[row], batch.context_lens[row], ends[row])
            keys[pages, 0, offsets, 0] = torch.from_numpy(new).float()
            values[pages, 0, offsets, 0] = torch.arange(batch.context_lens[row], ends[row]).float()
        token_ids = np.zeros(len(batch), dtype=np.int32)
        for row in np.flatnonzero(batch.samples):
            pages, offsets = self.where(tables[row], 0, ends[row])
            positions = values[pages, 0, offsets, 0].int().tolist()
            assert positions == list(range(ends[row])), "a page holds the KV of other positions"
            token_ids[row] = next_token(keys[pages, 0, offsets, 0].int().tolist())
            self.last_sampled[batch.slots[row]] = token_ids[row]
        return token_ids

    def where(self, table: np.ndarray, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and offsets of positions `start` to `stop`."""
        positions = np.arange(start, stop)
        pages = table[positions // self.cache.page_size].astype(np.int64)
        return torch.from_numpy(pages), torch.from_numpy(positions % self.cache.page_size)


def serve(
    cache: KVCache,
    config: SchedulerConfig,
    requests: list[Request],
    lag: int,
    aborts: Iterable[str] = (),
) -> Scheduler:
    """Add one request per iteration, run all to the end, and check what they received.

    An iteration later the next of `aborts` ends early, whether it has begun, gave way, or is over.
    """
    scheduler = Scheduler(cache, config, admission=Admission())
    device = PagedDevice(cache, config.max_num_seqs)
    received: dict[str, list[int]] = {request.request_id: [] for request in requests}
    queue = deque(requests)
    to_abort = deque(aborts)
    aborted: set[str] = set()
    in_flight: deque[tuple[Batch, np.ndarray]] = deque()
    while scheduler.has_work or queue:
        if to_abort and not queue and scheduler.abort(name := to_abort.popleft()):
            aborted.add(name)
        if queue:
            scheduler.add(queue.popleft())
        batch = scheduler.schedule()
        if batch is not None:
            in_flight.append((batch, device.run(batch)))
        if len(in_flight) > lag or (batch is None and in_flight):
            done, token_ids = in_flight.popleft()
            for event in scheduler.commit(IterationResult(done.iteration, token_ids)):
                if event.token_id is not None:
                    received[event.request_id].append(event.token_id)
        scheduler.check_integrity()
        cache.check_integrity()
    for request in requests:
        name = request.request_id
        wanted = generate_alone(request)
        assert received[name] == wanted[: len(received[name]) if name in aborted else None]
    assert cache.stats().pages_used == 0
    return scheduler


def conversations(seed: int, count: int) -> list[Request]:
    """Prompts that begin with one of three others, some of them with an earlier one's output."""
    rng = np.random.default_rng(seed)
    starts = [rng.integers(1, VOCAB, length, dtype=np.int32) for length in (6, 13, 20)]
    requests: list[Request] = []
    for index in range(count):
        start = starts[rng.integers(3)]
        if requests and rng.random() < 0.3:
            earlier = requests[rng.integers(len(requests))]
            answer = np.array(generate_alone(earlier), dtype=np.int32)
            start = np.concatenate((earlier.prompt_token_ids, answer))[:60]
        prompt = np.append(start, rng.integers(1, VOCAB, rng.integers(1, 6), dtype=np.int32))
        requests.append(
            Request(
                f"r{index}",
                prompt,
                int(rng.integers(1, 25)),
                stop_token_ids=STOPS,
                reuse_prefix=bool(rng.random() < 0.9),
            )
        )
    return requests


def make_cache(num_pages: int, page_size: int = 4, prefix_caching: bool = True) -> KVCache:
    layout = KVLayout(1, 1, 1, torch.float32, page_size=page_size)
    return KVCache(layout, num_pages, prefix_caching=prefix_caching)


def test_a_kv_cache_is_a_page_budget():
    budget: PageBudget = make_cache(1)
    assert (budget.page_size, budget.num_pages) == (4, 1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lag=st.integers(0, 2),
    page_size=st.sampled_from([1, 4, 16]),
    spare=st.integers(0, 40),
    budget=st.integers(1, 64),
    chunk=st.none() | st.integers(1, 24),
    num_seqs=st.integers(1, 8),
    prefix_caching=st.booleans(),
    aborts=st.lists(st.integers(0, 7).map("r{}".format), unique=True),
)
def test_tokens_are_those_of_each_request_alone(
    seed, lag, page_size, spare, budget, chunk, num_seqs, prefix_caching, aborts
):
    config = SchedulerConfig(
        max_model_len=90,
        max_num_batched_tokens=budget,
        max_num_seqs=num_seqs,
        max_prefill_chunk=chunk,
    )
    cache = make_cache(-(-90 // page_size) + spare, page_size, prefix_caching)
    serve(cache, config, conversations(seed, 8), lag, aborts)


def test_who_gave_way_can_be_aborted():
    """It has no pages then, and the cache remembers that it will come back."""
    cache = make_cache(4)
    scheduler = Scheduler(
        cache, SchedulerConfig(max_model_len=16, max_num_seqs=2), admission=Admission()
    )
    device = PagedDevice(cache, 2)
    for name in "ab":
        scheduler.add(Request(name, np.arange(4, dtype=np.int32), max_tokens=12))
    while scheduler.state_of("b") is not RequestState.PREEMPTED:
        batch = scheduler.schedule()
        scheduler.commit(IterationResult(batch.iteration, device.run(batch)))
    assert scheduler.abort("b")
    assert [event.finish_reason for event in scheduler.take_progress()] == [FinishReason.ABORT]
    scheduler.abort("a")
    scheduler.take_progress()
    assert cache.stats().pages_used == 0
    cache.check_integrity()


@pytest.mark.parametrize("lag", [0, 1])
def test_sharing_eviction_and_preemption_all_happen_and_change_nothing(lag):
    cache = make_cache(24)
    config = SchedulerConfig(max_model_len=90, max_num_seqs=8, max_num_batched_tokens=32)
    scheduler = serve(cache, config, conversations(1, 40), lag)
    stats = cache.stats()
    assert stats.hit_tokens > 100
    assert stats.evictions > 10
    assert scheduler.num_preemptions > 3
