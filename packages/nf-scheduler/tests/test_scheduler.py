"""What a Scheduler promises, case by case, on the toy engine of conftest.py or by hand."""

from __future__ import annotations

import subprocess
import sys

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


def config(**kwargs) -> SchedulerConfig:
    return SchedulerConfig(**{"max_model_len": 256, **kwargs})


def request(name: str, prompt_len: int, max_tokens: int, **kwargs) -> Request:
    prompt = np.arange(prompt_len, dtype=np.int32) + len(name) + 100 * (1 + ord(name[-1]))
    return Request(name, prompt, max_tokens, **kwargs)


def greedy(pages, config, **parts) -> Scheduler:
    """A scheduler that admits whoever finds pages now, such that they run out."""
    return Scheduler(pages, config, admission=Admission(), **parts)


def commit(scheduler: Scheduler, batch, *token_ids: int):
    """Answer a batch by hand; the events."""
    result = IterationResult(batch.iteration, np.array(token_ids, dtype=np.int32))
    return list(scheduler.commit(result))


@pytest.fixture
def pages(toy):
    return toy.Pages(page_size=4, num_pages=64)


def test_decodes_come_first_and_prefill_chunks_fill_the_budget(toy, pages):
    scheduler = greedy(pages, config(max_num_batched_tokens=8))
    scheduler.add(request("a", 3, 10))
    scheduler.add(request("b", 12, 10))
    scheduler.add(request("c", 2, 10))
    first = scheduler.schedule()
    assert first.request_ids == ["a", "b"]
    assert (first.num_decodes, first.query_start.tolist()) == (0, [0, 3, 8])
    assert first.samples.tolist() == [True, False]
    commit(scheduler, first, 7, 0)
    second = scheduler.schedule()
    assert second.request_ids == ["a", "b"]
    assert (second.num_decodes, second.query_start.tolist()) == (1, [0, 1, 8])
    assert second.context_lens.tolist() == [3, 5]
    assert second.token_ids[0] == 7
    assert second.samples.tolist() == [True, True]
    commit(scheduler, second, 8, 9)
    third = scheduler.schedule()
    assert third.request_ids == ["a", "b", "c"]
    assert (third.num_decodes, third.num_tokens) == (2, 4)
    assert third.token_ids[:2].tolist() == [8, 9]


def test_one_prompt_does_not_take_more_than_its_chunk(pages):
    scheduler = greedy(pages, config(max_num_batched_tokens=8, max_prefill_chunk=3))
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 5, 1))
    assert scheduler.schedule().query_start.tolist() == [0, 3, 6, 8]
    assert scheduler.schedule().query_start.tolist() == [0, 2, 4, 7]
    assert scheduler.schedule() is None


def test_a_lone_small_request_is_not_padded(pages):
    scheduler = greedy(pages, config(max_num_batched_tokens=512))
    scheduler.add(request("a", 3, 4))
    assert scheduler.schedule().num_tokens == 3
    assert scheduler.schedule().num_tokens == 1


def test_a_token_in_flight_is_minus_one_until_it_is_committed(pages):
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 3, 5))
    first, second, third = (scheduler.schedule() for _ in range(3))
    assert second.token_ids.tolist() == third.token_ids.tolist() == [-1]
    assert [b.context_lens.tolist() for b in (first, second, third)] == [[0], [3], [4]]
    commit(scheduler, first, 11)
    commit(scheduler, second, 12)
    commit(scheduler, third, 13)
    assert scheduler.schedule().token_ids.tolist() == [13]


def test_nothing_is_scheduled_beyond_max_tokens(pages):
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 3, 2))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.schedule() is None
    assert commit(scheduler, first, 11)[0].finish_reason is None
    assert scheduler.schedule() is None
    assert commit(scheduler, second, 12)[0].finish_reason is FinishReason.LENGTH
    assert not scheduler.has_work


def test_stop_at_the_lag_boundary_drops_the_speculative_token_and_frees_once(pages):
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 3, 10, stop_token_ids=frozenset({5})))
    first, second = scheduler.schedule(), scheduler.schedule()
    (event,) = commit(scheduler, first, 5)
    assert (event.token_id, event.finish_reason, event.stop_token) == (5, FinishReason.STOP, 5)
    assert event.ledger.output_tokens == 1
    assert scheduler.state_of("a") is RequestState.FINISHED
    assert scheduler.num_running == 0
    assert scheduler.has_work  # the second iteration still uses its pages
    assert pages.num_free == 63
    assert scheduler.schedule() is None
    assert commit(scheduler, second, 6) == []
    assert pages.num_free == 64
    assert pages.releases == {"a": 1}
    assert not scheduler.has_work
    with pytest.raises(KeyError, match="No request 'a'"):
        scheduler.state_of("a")


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_slot_is_not_reused_while_an_iteration_in_flight_uses_it(toy, pages, lag):
    """The toy engine checks it; here one slot serves many short requests that stop by surprise."""
    engine = toy.Engine(pages, config(max_num_seqs=1), lag)
    stops = frozenset(range(0, toy.VOCAB, 2))
    for index in range(20):
        engine.add(request(f"r{chr(65 + index)}", 2, 8, stop_token_ids=stops))
    engine.run()
    assert {int(batch.slots[0]) for batch in engine.batches} == {0}
    reasons = {life.end.finish_reason for life in engine.lives.values()}
    assert FinishReason.STOP in reasons


@pytest.mark.parametrize(
    ("min_tokens", "tokens", "reason"),
    [(0, [5], "stop"), (1, [5], "stop"), (2, [5, 5], "stop"), (9, [5, 5, 5], "length")],
)
def test_stop_ids_count_from_min_tokens_on(pages, min_tokens, tokens, reason):
    scheduler = greedy(pages, config())
    stops = frozenset({5})
    scheduler.add(request("a", 3, 3, min_tokens=min_tokens, stop_token_ids=stops))
    received = []
    while scheduler.has_work:
        (event,) = commit(scheduler, scheduler.schedule(), 5)
        received.append(event.token_id)
    assert (received, event.finish_reason) == (tokens, reason)
    assert event.stop_token == (5 if reason == "stop" else None)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_when_pages_run_out_the_latest_arrival_gives_way_and_comes_back(toy, lag):
    engine = toy.Engine(toy.Pages(page_size=4, num_pages=10), config(), lag)
    for name in ("a", "b", "c"):
        engine.add(request(name, 8, 24))
    seen = set()
    while engine.scheduler.has_work:
        engine.step()
        for name in ("a", "b", "c"):
            if engine.lives[name].end is None:
                seen.add((name, engine.scheduler.state_of(name)))
    engine.check_end()
    ledgers = [engine.lives[name].end.ledger for name in ("a", "b", "c")]
    assert ("c", RequestState.PREEMPTED) in seen
    assert ("a", RequestState.PREEMPTED) not in seen
    assert ledgers[0].preemptions == 0
    assert ledgers[2].preemptions >= 1
    assert sum(ledger.preemptions for ledger in ledgers) == engine.scheduler.num_preemptions
    assert [ledger.output_tokens for ledger in ledgers] == [24, 24, 24]
    ends = [ledger.finished for ledger in ledgers]
    assert ends == sorted(ends)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_long_answers_are_computed_again_as_they_were(toy, lag):
    """They are longer than what is kept of them beside the request, several times over."""
    engine = toy.Engine(toy.Pages(page_size=2, num_pages=120), config(max_model_len=128), lag)
    for name in ("a", "b", "c"):
        engine.add(request(name, 7, 110, reuse_prefix=False))
    engine.run()
    assert engine.scheduler.num_preemptions >= 1
    assert [engine.lives[name].end.ledger.output_tokens for name in "abc"] == [110, 110, 110]


def test_a_preempted_request_computes_its_output_again_but_does_not_sample_it(toy):
    pages = toy.Pages(page_size=4, num_pages=4)
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 7, 9))
    scheduler.add(request("b", 7, 9, reuse_prefix=False))
    commit(scheduler, scheduler.schedule(), 1, 51)
    commit(scheduler, scheduler.schedule(), 2, 52)
    batch = scheduler.schedule()  # both pages of `a` are full, and `b` has the others
    assert batch.request_ids == ["a"]
    assert scheduler.state_of("b") is RequestState.PREEMPTED
    assert (scheduler.num_waiting, scheduler.num_running) == (1, 1)
    scheduler.abort("a")
    commit(scheduler, batch, 3)
    again = scheduler.schedule()
    assert again.request_ids == ["b"]
    assert (again.num_decodes, again.context_lens.tolist()) == (0, [0])
    assert again.token_ids[7:].tolist() == [51, 52]
    (event,) = commit(scheduler, again, 53)
    assert event.token_id == 53


def test_who_is_in_flight_is_not_preempted_but_held_back(toy):
    pages = toy.Pages(page_size=4, num_pages=4)
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 7, 9))
    scheduler.add(request("b", 7, 9))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.schedule() is None  # `a` lacks a page; all others are in flight: commit first
    assert scheduler.num_preemptions == 0
    commit(scheduler, first, 1, 51)
    assert scheduler.schedule() is None
    commit(scheduler, second, 2, 52)
    assert scheduler.schedule().request_ids == ["a"]
    assert scheduler.num_preemptions == 1


def test_the_oldest_does_not_wait_until_younger_ones_have_filled_their_pages(toy):
    pages = toy.Pages(page_size=4, num_pages=4)
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 7, 9))
    scheduler.add(request("b", 5, 9))  # has room for three more tokens
    first, second = scheduler.schedule(), scheduler.schedule()
    assert second.request_ids == ["a", "b"]
    assert (
        scheduler.schedule() is None
    )  # `b` could go on, but then it would still be in flight later
    commit(scheduler, first, 1, 51)
    commit(scheduler, second, 2, 52)
    assert scheduler.schedule().request_ids == ["a"]
    assert scheduler.state_of("b") is RequestState.PREEMPTED


def test_others_go_on_while_one_waits_for_the_pages_of_a_younger_one_in_flight(toy):
    pages = toy.Pages(page_size=4, num_pages=6)
    scheduler = greedy(pages, config())
    for name, length in (("a", 7), ("b", 5), ("c", 5)):
        scheduler.add(request(name, length, 9))
    scheduler.schedule()
    assert scheduler.schedule().request_ids == ["a", "b", "c"]
    assert scheduler.schedule().request_ids == ["b"]


def test_nobody_starts_while_a_running_request_lacks_a_page(toy):
    """Also if pages come free in the middle of `schedule`, as the end of a restore may do."""

    class Pages(toy.Pages):
        def can_reserve(self, seq, num_tokens, match=None):
            return super().can_reserve(seq, num_tokens, match) and not self.refused

        @property
        def num_available(self):
            return 0 if self.refused else super().num_available

    pages = Pages(page_size=4, num_pages=64)
    pages.refused = False
    scheduler = greedy(pages, config(max_num_batched_tokens=4))
    scheduler.add(request("a", 4, 9))
    commit(scheduler, scheduler.schedule(), 1)
    scheduler.add(request("b", 2, 9))
    pages.refused = True
    assert scheduler.schedule() is None
    pages.refused = False
    assert scheduler.schedule().request_ids == ["a", "b"]


def test_a_prefill_in_flight_is_held_back_too(toy):
    scheduler = greedy(
        toy.Pages(page_size=4, num_pages=12),
        config(max_num_batched_tokens=64, max_prefill_chunk=8),
    )
    scheduler.add(request("a", 7, 9))
    scheduler.add(request("b", 40, 1))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first.query_start.tolist() == [0, 7, 15]
    assert second.query_start.tolist() == [0, 1, 9]
    assert scheduler.schedule() is None
    commit(scheduler, first, 1, 0)
    commit(scheduler, second, 2, 0)
    assert scheduler.schedule().request_ids == ["a"]
    assert scheduler.state_of("b") is RequestState.PREEMPTED


def test_a_cached_prefix_is_not_computed_but_the_last_token_always_is(toy, pages):
    scheduler = greedy(pages, config())
    prompt = np.arange(8, dtype=np.int32)
    scheduler.add(Request("a", prompt, 1))
    commit(scheduler, scheduler.schedule(), 5)
    scheduler.add(Request("b", prompt, 1))
    scheduler.add(Request("c", np.append(prompt, 9), 1))
    scheduler.add(Request("d", prompt, 1, reuse_prefix=False))
    batch = scheduler.schedule()
    assert batch.context_lens.tolist() == [4, 8, 0]
    assert batch.samples.all()
    events = commit(scheduler, batch, 1, 2, 3)
    assert [event.ledger.cached_tokens for event in events] == [4, 8, 0]


def test_abort_in_the_queue_takes_effect_at_once(pages):
    scheduler = greedy(pages, config(), clock=lambda: 3.0)
    scheduler.add(request("a", 3, 4))
    assert scheduler.abort("a")
    (event,) = scheduler.take_progress()
    assert (event.request_id, event.token_id) == ("a", None)
    assert event.finish_reason is FinishReason.ABORT
    assert event.ledger.first_scheduled is None
    assert event.ledger.finished == 3.0
    assert not scheduler.take_progress()
    assert not scheduler.has_work
    assert not scheduler.abort("a")


def test_abort_in_flight_takes_effect_with_its_last_iteration(pages):
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 3, 9))
    scheduler.add(request("b", 3, 9))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    assert not scheduler.take_progress()
    assert [event.request_id for event in commit(scheduler, first, 1, 2)] == ["b"]
    assert "a" in pages.pages
    events = commit(scheduler, second, 3, 4)
    assert [(event.request_id, event.token_id) for event in events] == [("b", 4), ("a", None)]
    assert "a" not in pages.pages


def test_abort_between_iterations_is_reported_by_the_next_commit(pages):
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 3, 9))
    scheduler.add(request("b", 3, 9))
    commit(scheduler, scheduler.schedule(), 1, 2)
    assert scheduler.abort("a")
    assert "a" not in pages.pages
    events = commit(scheduler, scheduler.schedule(), 3)
    assert [(event.request_id, event.token_id) for event in events] == [("b", 3), ("a", None)]
    assert events[1].ledger.output_tokens == 1


def test_an_id_can_be_used_again_after_the_request_has_gone(pages):
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 3, 1))
    with pytest.raises(ValueError, match="request_id 'a' is in use"):
        scheduler.add(request("a", 3, 1))
    commit(scheduler, scheduler.schedule(), 1)
    scheduler.add(request("a", 3, 1))
    commit(scheduler, scheduler.schedule(), 1)
    assert not scheduler.has_work


def test_the_ledger_tells_times_and_counts(toy):
    engine = toy.Engine(toy.Pages(4, 64), config(max_num_batched_tokens=4))
    engine.now = 10.0
    engine.add(request("a", 9, 2))
    engine.run()
    ledger = engine.lives["a"].end.ledger
    # Every schedule and every commit is one second later; three chunks and one decode.
    assert (ledger.arrival, ledger.first_scheduled) == (10.0, 11.0)
    assert (ledger.first_token, ledger.finished) == (16.0, 18.0)
    assert (ledger.prompt_tokens, ledger.output_tokens, ledger.cached_tokens) == (9, 2, 0)
    assert (ledger.prefill_chunks, ledger.preemptions) == (3, 0)


def test_requests_that_can_never_fit_are_refused_by_name_and_number(pages):
    scheduler = greedy(pages, config(max_model_len=1000))
    with pytest.raises(ValueError, match=r"may reach 1001 tokens \(991 of the prompt.*Shorten"):
        scheduler.add(request("a", 991, 10))
    with pytest.raises(ValueError, match=r"258 tokens, which take 65 pages.* has 64"):
        scheduler.add(request("a", 250, 8))
    assert not scheduler.has_work
    scheduler.add(request("a", 250, 7))  # the KV of the last token is never computed
    assert scheduler.has_work


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"request_id": ""}, "request_id is empty"),
        ({"prompt_token_ids": np.array([], dtype=np.int32)}, r"of shape \(0,\); expected one"),
        ({"prompt_token_ids": np.zeros((1, 2), dtype=np.int32)}, r"of shape \(1, 2\)"),
        ({"prompt_token_ids": np.array([0.5])}, "is float64 of shape"),
        ({"max_tokens": 0}, "max_tokens of 'a' is 0; expected at least 1"),
        ({"min_tokens": -1}, "min_tokens of 'a' is -1; expected 0 or more"),
    ],
)
def test_bad_requests_are_refused(fields, message):
    good = {"request_id": "a", "prompt_token_ids": np.ones(3, dtype=np.int32), "max_tokens": 4}
    with pytest.raises(ValueError, match=message):
        Request(**{**good, **fields})


def test_prompts_of_other_integers_become_int32():
    assert Request("a", np.array([1, 2], dtype=np.int64), 1).prompt_token_ids.dtype == np.int32


@pytest.mark.parametrize(
    "name", ["max_model_len", "max_num_batched_tokens", "max_num_seqs", "max_prefill_chunk"]
)
def test_bad_limits_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        config(**{name: 0})


def test_results_out_of_order_or_of_the_wrong_size_are_refused(pages):
    scheduler = greedy(pages, config())
    result = IterationResult(0, np.zeros(1, dtype=np.int32))
    with pytest.raises(ValueError, match="none is in flight"):
        scheduler.commit(result)
    scheduler.add(request("a", 3, 4))
    scheduler.schedule()
    scheduler.schedule()
    with pytest.raises(ValueError, match="commit of iteration 1: expected 0"):
        scheduler.commit(IterationResult(1, np.zeros(1, dtype=np.int32)))
    with pytest.raises(ValueError, match=r"has shape \(2,\); expected \(1,\)"):
        scheduler.commit(IterationResult(0, np.zeros(2, dtype=np.int32)))
    assert scheduler.commit(result).request_ids == ["a"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in_flight", "counts 2 iterations in flight, but is in 1"),
        ("written", "has 3 tokens, but counts 4"),
        ("known", "knows 4 tokens, the last of which is 0, but its last token is"),
        ("pending", "awaits 2 tokens, but 1 are being sampled"),
        ("scheduled", "published, completed, scheduled and at most"),
    ],
)
def test_integrity_check_finds_a_wrong_count(pages, name, message):
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 3, 4))
    scheduler.schedule()
    scheduler.check_integrity()
    getattr(scheduler._running, name)[0] += 1
    with pytest.raises(RuntimeError, match=message):
        scheduler.check_integrity()


def test_integrity_check_finds_a_request_in_two_places(pages):
    scheduler = greedy(pages, config())
    scheduler.add(request("a", 3, 4))
    scheduler.schedule()
    scheduler._queue.add(scheduler._sequences["a"])
    with pytest.raises(RuntimeError, match="queued twice, or queued while it occupies a slot"):
        scheduler.check_integrity()


def test_the_package_imports_without_torch():
    code = "import sys; sys.modules['torch'] = None; import nf_scheduler"
    subprocess.run([sys.executable, "-c", code], check=True)
