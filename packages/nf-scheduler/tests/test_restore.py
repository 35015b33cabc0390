"""KV that comes up from a lower tier: who waits for it, what comes of it, and who gives way."""

from __future__ import annotations

import numpy as np
import pytest

from nf_scheduler import (
    Admission,
    FinishReason,
    IterationResult,
    Request,
    RequestState,
    Scheduler,
    SchedulerConfig,
)

PROMPT = np.arange(9, dtype=np.int32)  # two pages and a token


def config(**kwargs) -> SchedulerConfig:
    return SchedulerConfig(**{"max_model_len": 256, **kwargs})


def request(name: str, prompt_len: int, max_tokens: int, **kwargs) -> Request:
    prompt = np.arange(prompt_len, dtype=np.int32) + 100 * (1 + ord(name[-1]))
    return Request(name, prompt, max_tokens, **kwargs)


def greedy(pages, config, **parts) -> Scheduler:
    """A scheduler that admits whoever finds pages now, such that they run out."""
    return Scheduler(pages, config, admission=Admission(), **parts)


def commit(scheduler: Scheduler, batch, *token_ids: int):
    """Answer a batch by hand; the events."""
    result = IterationResult(batch.iteration, np.array(token_ids, dtype=np.int32))
    return list(scheduler.commit(result))


def stored(toy, num_pages: int = 64, delay: int = 0, prompts=(PROMPT,), **fate):
    """Pages of four tokens; the full ones of `prompts` are on the host."""
    return toy.Pages(4, num_pages, stored=prompts, delay=lambda: delay, **fate)


def test_who_is_restored_holds_slot_and_pages_and_does_not_block_others(toy):
    pages = stored(toy, delay=2)
    now = 5.0
    scheduler = greedy(pages, config(), clock=lambda: now)
    scheduler.add(Request("a", PROMPT, 1))
    scheduler.add(request("b", 5, 9))
    batch = scheduler.schedule()
    assert batch.request_ids == ["b"]
    assert scheduler.state_of("a") is RequestState.WAITING_FOR_RESTORE
    assert (scheduler.num_waiting, scheduler.num_restoring, scheduler.num_running) == (1, 1, 1)
    assert pages.pages == {"a": 3, "b": 2}
    commit(scheduler, batch, 1)
    now = 7.0
    batch = scheduler.schedule()
    assert batch.request_ids == ["b"]
    commit(scheduler, batch, 2)
    now = 8.0
    batch = scheduler.schedule()
    assert batch.request_ids == ["b", "a"]
    assert batch.context_lens.tolist() == [6, 8]
    assert scheduler.state_of("a") is RequestState.RUNNING
    assert (scheduler.num_waiting, scheduler.num_restoring, scheduler.num_running) == (0, 0, 2)
    _, end = commit(scheduler, batch, 3, 4)
    assert (end.ledger.first_scheduled, end.ledger.restore_seconds) == (5.0, 3.0)
    assert end.ledger.cached_tokens == 8
    assert end.ledger.cached_tokens_by_tier == {"device": 0, "host": 8}


def test_what_is_on_the_device_already_is_not_waited_for(toy):
    pages = stored(toy, delay=2)
    scheduler = greedy(pages, config())
    scheduler.add(Request("a", PROMPT, 1))
    assert [scheduler.schedule() for _ in range(2)] == [None, None]
    commit(scheduler, scheduler.schedule(), 1)
    scheduler.add(Request("b", PROMPT, 1))
    batch = scheduler.schedule()
    assert batch.context_lens.tolist() == [8]
    (end,) = commit(scheduler, batch, 1)
    assert end.ledger.cached_tokens_by_tier == {"device": 8, "host": 0}
    assert end.ledger.restore_seconds == 0.0


def test_nothing_is_scheduled_while_everyone_is_restored(toy):
    prompts = [PROMPT, PROMPT + 20]
    scheduler = greedy(stored(toy, delay=1, prompts=prompts), config())
    for name, prompt in zip("ab", prompts, strict=True):
        scheduler.add(Request(name, prompt, 4))
    assert scheduler.schedule() is None
    assert (scheduler.num_restoring, scheduler.num_running) == (2, 0)
    assert scheduler.schedule().request_ids == ["a", "b"]


@pytest.mark.parametrize(
    ("come", "tiers"),
    [(8, {"device": 0, "host": 8}), (4, {"device": 0, "host": 4}), (0, {"device": 0, "host": 0})],
)
def test_what_did_not_come_is_computed(toy, come, tiers):
    pages = stored(toy, delay=1, arrives=lambda num_tokens: come)
    scheduler = greedy(pages, config(max_num_batched_tokens=6))
    scheduler.add(Request("a", PROMPT, 1))
    assert scheduler.schedule() is None
    starts, events = [], []
    while scheduler.has_work:
        batch = scheduler.schedule()
        starts.append(int(batch.context_lens[0]))
        events += commit(scheduler, batch, 7)
    assert starts == {8: [8], 4: [4], 0: [0, 6]}[come]
    assert events[-1].ledger.cached_tokens == come
    assert events[-1].ledger.cached_tokens_by_tier == tiers
    assert "a" not in pages.pages


def test_an_abort_ends_a_restore_at_once(toy):
    pages = stored(toy, delay=99)
    now = 1.0
    scheduler = greedy(pages, config(), clock=lambda: now)
    scheduler.add(Request("a", PROMPT, 4))
    assert scheduler.schedule() is None
    assert scheduler.has_work
    now = 4.0
    assert scheduler.abort("a")
    (event,) = scheduler.take_progress()
    assert event.finish_reason is FinishReason.ABORT
    assert (event.ledger.restore_seconds, event.ledger.cached_tokens) == (3.0, 0)
    assert not scheduler.has_work
    assert (pages.interrupted, pages.num_free) == (1, 64)
    assert scheduler.num_waiting == scheduler.num_restoring == 0
    scheduler.check_integrity()


def test_who_is_restored_gives_way_to_an_older_one_and_gains_nothing(toy):
    pages = stored(toy, num_pages=5, delay=3)
    now = 0.0
    scheduler = greedy(pages, config(), clock=lambda: now)
    scheduler.add(request("old", 8, 9))
    scheduler.add(Request("a", PROMPT, 1))
    batch = scheduler.schedule()
    assert batch.request_ids == ["old"]
    assert scheduler.state_of("a") is RequestState.WAITING_FOR_RESTORE
    assert pages.num_free == 0
    commit(scheduler, batch, 1)
    now = 2.0
    batch = scheduler.schedule()  # `old` needs a third page
    assert batch.request_ids == ["old"]
    assert scheduler.state_of("a") is RequestState.PREEMPTED
    assert (pages.interrupted, scheduler.num_preemptions) == (1, 1)
    assert (scheduler.num_waiting, scheduler.num_restoring) == (1, 0)
    scheduler.check_integrity()
    scheduler.abort("old")
    commit(scheduler, batch, 2)
    now = 10.0
    assert scheduler.schedule() is None  # its restore begins anew
    assert scheduler.state_of("a") is RequestState.WAITING_FOR_RESTORE
    assert [scheduler.schedule() for _ in range(2)] == [None, None]
    now = 11.0
    batch = scheduler.schedule()
    assert batch.context_lens.tolist() == [8]
    (end,) = commit(scheduler, batch, 3)
    assert (end.ledger.preemptions, end.ledger.restore_seconds) == (1, 3.0)
    # It had not run before, so that this is no return.
    assert (end.ledger.cached_tokens, end.ledger.restored_tokens) == (8, 0)


def test_the_oldest_waits_for_its_restore_alone_and_takes_the_pages_of_younger_ones(toy):
    """`b` lacks a page while `a`, older, is restored: it waits for `a`, and gives way to it."""
    pages = stored(toy, num_pages=6, delay=3)
    scheduler = greedy(pages, config())
    scheduler.add(Request("a", PROMPT, 9))
    scheduler.add(request("b", 11, 9))
    commit(scheduler, scheduler.schedule(), 1)  # `b` fills its third page
    commit(scheduler, scheduler.schedule(), 2)
    assert scheduler.schedule() is None
    assert scheduler.state_of("b") is RequestState.RUNNING
    assert scheduler.num_restoring == 1
    for token in range(4):
        batch = scheduler.schedule()
        assert batch.request_ids == ["a"]
        commit(scheduler, batch, token)
    assert scheduler.num_preemptions == 0
    assert scheduler.schedule().request_ids == ["a"]  # needs a fourth page
    assert scheduler.state_of("b") is RequestState.PREEMPTED


def run_until_preempted(scheduler: Scheduler, name: str) -> None:
    for token in range(99):
        if scheduler.state_of(name) is RequestState.PREEMPTED:
            return
        batch = scheduler.schedule()
        commit(scheduler, batch, *[token] * len(batch))
    raise AssertionError(f"{name!r} is never preempted")


@pytest.mark.parametrize("delay", [0, 2])
def test_who_was_preempted_returns_without_computing_anything_again(toy, delay):
    pages = toy.Pages(4, 5, delay=lambda: delay)
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 7, 9))
    scheduler.add(request("b", 9, 9))
    run_until_preempted(scheduler, "b")  # when `a` has filled two pages
    assert pages.preempted == [("b", 10)]  # two pages and a half are handed over
    scheduler.abort("a")
    assert [scheduler.schedule() for _ in range(delay)] == [None] * delay
    batch = scheduler.schedule()
    assert batch.request_ids == ["b"]
    assert (batch.context_lens.tolist(), batch.num_tokens) == ([10], 1)
    assert batch.samples.all()
    ledger = scheduler._sequences["b"].ledger
    assert (ledger.cached_tokens, ledger.restored_tokens, ledger.preemptions) == (0, 10, 1)
    # The next page is reported when it is full, with the rest of its tokens only.
    for token in (50, 51):
        commit(scheduler, batch, token)
        batch = scheduler.schedule()
    assert len(pages.committed["b"]) == 12


def test_a_prefill_that_was_preempted_goes_on_where_it_stopped(toy):
    pages = toy.Pages(4, 6)
    scheduler = greedy(pages, config(max_prefill_chunk=3))
    scheduler.add(request("a", 4, 9))
    scheduler.add(request("b", 17, 1))
    commit(scheduler, scheduler.schedule(), 1, 0)  # three tokens of each
    commit(scheduler, scheduler.schedule(), 1, 0)
    run_until_preempted(scheduler, "b")
    ((name, num_tokens),) = pages.preempted
    assert name == "b"
    assert num_tokens % 4
    assert num_tokens < 17
    scheduler.abort("a")
    batch = scheduler.schedule()
    assert (batch.context_lens.tolist(), batch.num_tokens) == ([num_tokens], 3)


def test_who_is_aborted_while_preempted_leaves_nothing_behind(toy):
    pages = toy.Pages(4, 5)
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 7, 9))
    scheduler.add(request("b", 9, 9))
    run_until_preempted(scheduler, "b")
    assert pages.kept.keys() == {"b"}
    assert scheduler.abort("b")
    assert pages.kept == {}
    assert pages.releases == {"b": 1}
    scheduler.abort("a")
    scheduler.add(Request("b", PROMPT, 1))  # the name is free, and finds nothing of the other
    assert scheduler.schedule().context_lens.tolist() == [0]


def test_who_reuses_nothing_is_released_when_it_gives_way(toy):
    pages = toy.Pages(4, 5)
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 7, 9))
    scheduler.add(request("b", 9, 9, reuse_prefix=False))
    run_until_preempted(scheduler, "b")
    assert (pages.preempted, pages.releases) == ([], {"b": 1})
    assert scheduler.abort("b")
    assert pages.releases == {"b": 1}


def test_kv_is_reused_under_the_same_salt_only(toy):
    pages = toy.Pages(4, 64)
    scheduler = greedy(pages, config())

    def cached(name: str, **kwargs) -> int:
        scheduler.add(Request(name, PROMPT, 1, **kwargs))
        batch = scheduler.schedule()
        commit(scheduler, batch, 1)
        return int(batch.context_lens[0])

    assert cached("a", cache_salt="x", reuse_prefix=False) == 0
    assert cached("b") == 0
    assert cached("c", cache_salt="y") == 0
    assert cached("d", cache_salt="x") == 8  # what `a` computed
    assert cached("e", cache_salt="y") == 8
    assert cached("f") == 8


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_who_was_restored_fits_into_the_iterations_of_those_who_run(toy, budget):
    """Each that runs takes a token of the budget, and those that are restored will, too."""
    prompts = [PROMPT + 20 * index for index in range(6)]
    engine = toy.Engine(
        stored(toy, delay=3, prompts=prompts),
        config(max_num_batched_tokens=budget, max_num_seqs=6),
    )
    for index, prompt in enumerate(prompts):
        engine.add(Request(f"r{index}", prompt, 12))
    most = 0
    while engine.scheduler.has_work:
        engine.step()  # checks the size of every batch
        most = max(most, engine.scheduler.num_restoring)
    engine.check_end()
    assert most == budget


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("restoring", False, "'a' is WAITING_FOR_RESTORE in a slot with restoring=False"),
        ("scheduled", 1, "'a' waits for a restore, but has been scheduled"),
        ("alive", False, "'a' is WAITING_FOR_RESTORE in a slot with alive=False"),
    ],
)
def test_integrity_check_finds_a_broken_wait(toy, name, value, message):
    scheduler = greedy(stored(toy, delay=9), config())
    scheduler.add(Request("a", PROMPT, 4))
    assert scheduler.schedule() is None
    scheduler.check_integrity()
    getattr(scheduler._running, name)[0] = value
    with pytest.raises(RuntimeError, match=message):
        scheduler.check_integrity()
