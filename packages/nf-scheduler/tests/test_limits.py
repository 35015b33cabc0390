"""Bounds of the queue, shares of tenants, deadlines, and answers that share a prompt."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from nf_scheduler import (
    Admission,
    FinishReason,
    IterationResult,
    QueueFull,
    Request,
    RequestState,
    Scheduler,
    SchedulerConfig,
    TokenBudget,
)


def make(pages, **config) -> Scheduler:
    config = SchedulerConfig(**{"max_model_len": 256, **config})
    return Scheduler(pages, config, admission=Admission(), clock=lambda: Time.now)


class Time:
    now = 0.0


@pytest.fixture(autouse=True)
def start_of_time():
    Time.now = 0.0


@pytest.fixture
def pages(toy):
    return toy.Pages(page_size=4, num_pages=64)


def request(name: str, prompt_len: int = 4, max_tokens: int = 1, **kwargs) -> Request:
    prompt = np.arange(prompt_len, dtype=np.int32) + 100 * (1 + ord(name[-1]))
    return Request(name, prompt, max_tokens, **kwargs)


def commit(scheduler: Scheduler, batch, token: int = 7) -> list:
    return list(scheduler.commit(IterationResult(batch.iteration, np.full(len(batch), token))))


def test_a_full_queue_refuses_and_says_so(pages):
    scheduler = make(pages, max_num_seqs=1, max_queued_requests=2)
    scheduler.add(request("a", 3, 3))
    commit(scheduler, scheduler.schedule())
    for name in "bc":
        scheduler.add(request(name))
    with pytest.raises(QueueFull, match="2 requests are queued, and max_queued_requests is 2"):
        scheduler.add(request("d"))
    assert scheduler.stats.refused == 1
    scheduler.abort("b")
    scheduler.add(request("d"))  # the name was not kept
    scheduler.check_integrity()


def test_a_queue_bounded_by_tokens_takes_one_request_of_any_length(pages):
    scheduler = make(pages, max_num_seqs=1, max_queued_tokens=10)
    scheduler.add(request("a", 100))
    with pytest.raises(QueueFull, match="prompts of 100 tokens, this one has 1, and max_queued_to"):
        scheduler.add(request("b", 1))
    commit(scheduler, scheduler.schedule())
    scheduler.add(request("b", 6))
    scheduler.add(request("c", 4))
    assert scheduler.stats.queued_prompt_tokens == 10


def test_tenants_get_equal_shares_however_many_requests_they_have(pages):
    scheduler = make(pages, max_num_seqs=1)
    for number in range(40):
        scheduler.add(request(f"a{number}", 4, 4, tenant="many"))
    ends = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        ends += [event.request_id for event in commit(scheduler, batch) if event.end]
        if len(ends) == 10 and not any(name.startswith("b") for name in ends):
            for number in range(5):
                scheduler.add(request(f"b{number}", 4, 4, tenant="few"))
            ends.append("b: begin")
    # Who comes later has no claim for the time before, and then every other turn.
    begin = ends.index("b: begin")
    assert Counter(name[0] for name in ends[begin + 1 : begin + 11]) == {"a": 5, "b": 5}
    scheduler.check_integrity()


def test_a_tenant_with_larger_requests_gets_fewer_of_them(pages):
    scheduler = make(pages, max_num_seqs=1)
    for number in range(12):
        scheduler.add(request(f"a{number}", 60, 1, tenant="large"))
        scheduler.add(request(f"b{number}", 6, 1, tenant="small"))
    ends = []
    for _ in range(11):
        ends += [event.request_id[0] for event in commit(scheduler, scheduler.schedule())]
    assert Counter(ends) == {"b": 10, "a": 1}


def test_tenants_that_have_gone_are_forgotten(pages):
    scheduler = make(pages, max_num_seqs=4)
    for number in range(100):
        scheduler.add(request(f"r{number}", tenant=f"t{number}"))
        commit(scheduler, scheduler.schedule())
    assert scheduler.stats.tenants == 0


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("place", ["queue", "prefill", "decode"])
def test_a_deadline_ends_a_request_wherever_it_is(toy, pages, lag, place):
    config = SchedulerConfig(max_model_len=256, max_num_seqs=1, max_num_batched_tokens=8)
    engine = toy.Engine(pages, config, lag)
    if place == "queue":
        engine.add(request("a", 4, 30))
        engine.add(request("b", 4, 30, deadline=10.0))
    else:
        engine.add(request("b", 100 if place == "prefill" else 4, 30, deadline=10.0))
    engine.run()
    end = engine.lives["b"].end
    assert (end.token_id, end.finish_reason) == (None, FinishReason.TIMEOUT)
    assert 10.0 <= end.ledger.finished <= 10.0 + 4 * (lag + 1)
    assert bool(engine.lives["b"].received) == (place == "decode")
    assert engine.scheduler.stats.timeouts == 1
    if place == "queue":
        assert len(engine.lives["a"].received) == 30


def test_a_deadline_of_an_earlier_request_of_that_name_does_not_count(pages):
    scheduler = make(pages)
    scheduler.add(request("a", deadline=5.0))
    commit(scheduler, scheduler.schedule())
    scheduler.add(request("a", 4, 2))
    Time.now = 9.0
    commit(scheduler, scheduler.schedule())
    assert scheduler.state_of("a") is RequestState.RUNNING


def test_a_deadline_has_to_be_a_time():
    with pytest.raises(ValueError, match="deadline of 'a' is NaN"):
        request("a", deadline=math.nan)


def forks(count: int, prompt_len: int, max_tokens: int, **kwargs) -> list[Request]:
    prompt = np.arange(prompt_len, dtype=np.int32) % 20
    return [
        Request(f"f{i}", prompt, max_tokens, fork_of="f0" if i else None, **kwargs)
        for i in range(count)
    ]


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("prompt_len", [1, 2, 4, 5, 30])
def test_answers_to_one_prompt_compute_it_once(toy, pages, lag, prompt_len):
    config = SchedulerConfig(max_model_len=256, max_num_batched_tokens=8)
    engine = toy.Engine(pages, config, lag)
    for one in forks(4, prompt_len, 9):
        engine.add(one)
    engine.run()
    assert [child for _, child in pages.forks] == ["f1", "f2", "f3"]
    for name in ("f1", "f2", "f3"):
        ledger = engine.lives[name].end.ledger
        assert ledger.cached_tokens == prompt_len - 1
        assert ledger.prefill_chunks == 1
    computed = sum(batch.num_tokens - batch.num_decodes for batch in engine.batches)
    assert computed == prompt_len + 3


@pytest.mark.parametrize("end", ["abort", "finish"])
def test_who_waits_for_a_prompt_that_is_gone_computes_its_own(toy, pages, end):
    config = SchedulerConfig(max_model_len=256, max_num_batched_tokens=8)
    engine = toy.Engine(pages, config)
    for one in forks(3, 30, 1 if end == "finish" else 9):
        engine.add(one)
    engine.step()
    assert engine.scheduler.num_waiting == 2
    if end == "abort":
        engine.abort("f0")
    engine.run()
    assert not pages.forks
    assert all(engine.lives[name].received for name in ("f1", "f2"))


def test_who_waits_for_a_prompt_can_be_aborted(toy, pages):
    engine = toy.Engine(pages, SchedulerConfig(max_model_len=256, max_num_batched_tokens=8))
    for one in forks(3, 30, 2):
        engine.add(one)
    engine.step()
    assert engine.abort("f1")
    engine.run()
    assert [child for _, child in pages.forks] == ["f2"]


def test_another_prompt_is_not_shared(toy, pages):
    engine = toy.Engine(pages, SchedulerConfig(max_model_len=256))
    engine.add(request("a", 20, 9))
    engine.add(request("b", 20, 9, fork_of="a"))
    engine.add(
        Request("c", engine.lives["a"].request.prompt_token_ids, 9, cache_salt="x", fork_of="a")
    )
    for one in (
        Request("d", np.arange(9), 9),
        Request("e", np.arange(9), 9, fork_of="d", reuse_prefix=False),
    ):
        engine.add(one)
    engine.run()
    assert not pages.forks


def test_budgets_by_number_of_decodes(pages):
    budgets = (TokenBudget(1, 8, 3), TokenBudget(2, 16, 16))
    scheduler = make(pages, max_num_batched_tokens=32, budgets=budgets)
    for name in "abcd":
        scheduler.add(request(name, 20, 9))
    batch = scheduler.schedule()
    assert np.diff(batch.query_start).tolist() == [3, 3, 2]
    commit(scheduler, batch)
    for _ in range(8):
        commit(scheduler, scheduler.schedule())
    assert scheduler.schedule().num_decodes >= 2


def test_budgets_change_from_the_next_batch_on(pages):
    scheduler = make(pages, max_num_batched_tokens=32, budgets=(TokenBudget(8, 8, 3),))
    for name in "abcd":
        scheduler.add(request(name, 30, 9))
    first = scheduler.schedule()
    scheduler.set_budgets((TokenBudget(8, 16, 16),))
    second = scheduler.schedule()  # one iteration ahead
    scheduler.set_budgets(())
    third = scheduler.schedule()
    assert [batch.num_tokens for batch in (first, second, third)] == [8, 16, 32]
    with pytest.raises(ValueError, match="num_tokens of a budget is 33; expected at most"):
        scheduler.set_budgets((TokenBudget(1, 33, 1),))
    assert scheduler.schedule().num_tokens == 32
    for batch in (first, second, third):
        commit(scheduler, batch)


def test_bad_budgets_are_refused():
    with pytest.raises(ValueError, match="num_tokens is 3, for up to 4 decodes"):
        TokenBudget(4, 3, 1)
    with pytest.raises(ValueError, match="prefill_chunk is 0; expected at least 1"):
        TokenBudget(4, 8, 0)
    config = {"max_model_len": 64, "max_num_batched_tokens": 8}
    with pytest.raises(ValueError, match=r"budgets is \[4, 2\]; expected ascending"):
        SchedulerConfig(**config, budgets=(TokenBudget(4, 8, 8), TokenBudget(2, 8, 8)))
    with pytest.raises(ValueError, match="num_tokens of a budget is 9; expected at most"):
        SchedulerConfig(**config, budgets=(TokenBudget(4, 9, 9),))
