"""Who goes first, who gives way, and how much prefill goes beside decodes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nf_scheduler import (
    POLICIES,
    Admission,
    IterationResult,
    Policy,
    PrefixAffinity,
    Priority,
    Request,
    Scheduler,
    SchedulerConfig,
    ServiceLevel,
    ShortestFirst,
    SloAware,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(pages, policy, clock, **config) -> Scheduler:
    config = SchedulerConfig(**{"max_model_len": 256, "max_num_seqs": 1, **config})
    return Scheduler(pages, config, policy=policy, admission=Admission(), clock=clock)


def request(name: str, prompt_len: int = 4, max_tokens: int = 1, **kwargs) -> Request:
    prompt = np.arange(prompt_len, dtype=np.int32) + 100 * (1 + ord(name[-1]))
    return Request(name, prompt, max_tokens, **kwargs)


def commit(scheduler: Scheduler, batch) -> list:
    return list(scheduler.commit(IterationResult(batch.iteration, np.full(len(batch), 7))))


def order(scheduler: Scheduler) -> list[str]:
    """Run to the end; the requests in the order of their ends."""
    ends = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        ends += [event.request_id for event in commit(scheduler, batch) if event.end]
    return ends


def test_every_policy_has_a_name():
    assert list(POLICIES) == ["fcfs", "priority", "shortest", "prefix", "slo"]


def test_lower_priority_goes_first_and_waiting_catches_up(toy, clock):
    scheduler = make(toy.Pages(4, 64), Priority(ageing_seconds=10.0), clock)
    scheduler.add(request("late", priority=1))
    clock.now = 5.0
    scheduler.add(request("first", priority=0))
    clock.now = 9.0
    scheduler.add(request("urgent", priority=-1))
    clock.now = 11.0
    scheduler.add(request("too late", priority=0))  # `late` has waited longer than a step is worth
    assert order(scheduler) == ["urgent", "first", "late", "too late"]


def test_the_lowest_priority_gives_way_whoever_came_first(toy, clock):
    scheduler = make(toy.Pages(4, 4), Priority(), clock, max_num_seqs=2)
    scheduler.add(request("early", 7, 9, priority=1))
    clock.now = 1.0
    scheduler.add(request("urgent", 7, 9, priority=0))
    while not scheduler.num_preemptions:
        commit(scheduler, scheduler.schedule())
    assert scheduler.state_of("early").name == "PREEMPTED"
    assert scheduler.state_of("urgent").name == "RUNNING"


def test_nobody_waits_for_ever_behind_more_urgent_ones(toy, clock):
    """An endless stream of them, as fast as the device can take it."""
    scheduler = make(toy.Pages(4, 64), Priority(ageing_seconds=5.0), clock)
    scheduler.add(request("patient", priority=3))
    for number in range(40):
        scheduler.add(request(f"r{number}", priority=0))
        batch = scheduler.schedule()
        if "patient" in batch.request_ids:
            assert number == 15  # 3 steps of 5 seconds
            return
        commit(scheduler, batch)
        clock.now += 1.0
    pytest.fail("it starves")


def test_the_least_work_goes_first(toy, clock):
    scheduler = make(toy.Pages(4, 64), ShortestFirst(seconds_per_token=1.0), clock)
    scheduler.add(request("long prompt", 60, 4))
    scheduler.add(request("long answer", 4, 90))
    scheduler.add(request("short", 4, 4))
    clock.now = 200.0
    scheduler.add(request("late", 1, 1))
    assert order(scheduler) == ["short", "long prompt", "long answer", "late"]


def test_who_finds_its_prefix_goes_first_also_if_that_comes_later(toy, clock):
    scheduler = make(toy.Pages(4, 64), PrefixAffinity(seconds_per_token=1.0), clock)
    prompts = {"a": 1, "b": 2, "c": 1, "d": 2}
    for name, kind in prompts.items():
        clock.now += 0.1
        scheduler.add(Request(name, np.full(9, kind, dtype=np.int32), 1))
    assert order(scheduler) == ["a", "c", "b", "d"]


def test_a_policy_is_one_small_class(toy, clock):
    class LastComeFirst(Policy):
        def rank(self, sequence, facts):
            return -sequence.ledger.arrival

    scheduler = make(toy.Pages(4, 64), LastComeFirst(), clock)
    for name in "abc":
        clock.now += 1.0
        scheduler.add(request(name))
    assert order(scheduler) == ["c", "b", "a"]


LEVELS = {"chat": ServiceLevel(ttft=1.0, tpot=0.010), "": ServiceLevel(ttft=10.0)}


def test_who_is_due_first_goes_first(toy, clock):
    scheduler = make(toy.Pages(4, 64), SloAware(LEVELS), clock)
    scheduler.add(request("batch"))
    clock.now = 5.0
    scheduler.add(request("chat", request_class="chat"))
    scheduler.add(request("unknown class", request_class="?"))
    clock.now = 9.5
    scheduler.add(request("late chat", request_class="chat"))
    assert order(scheduler) == ["chat", "batch", "late chat", "unknown class"]


def run_slo(toy, clock, levels, seconds_per_token: float) -> list[int]:
    """A chat decodes beside a long prompt; the prompt tokens of each iteration."""
    policy = SloAware(levels)
    config = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 4096}
    scheduler = make(toy.Pages(4, 2048), policy, clock, **config)

    def step() -> int:
        batch = scheduler.schedule()
        clock.now += seconds_per_token * batch.num_tokens
        commit(scheduler, batch)
        return batch.num_tokens - batch.num_decodes

    scheduler.add(request("warm-up", 600, 20))  # it learns how long iterations take
    while scheduler.has_work:
        step()
    scheduler.add(request("chat", 4, 400, request_class="chat"))
    step()
    scheduler.add(request("document", 1200, 1, reuse_prefix=False))
    prefills = []
    while scheduler.has_work and sum(prefills) < 1200:
        prefills.append(step())
    return prefills


def test_prefill_beside_decodes_is_what_their_target_leaves_time_for(toy, clock):
    """At 1 ms per token, 10 ms per token of the chat leave room for nine of the prompt."""
    prefills = run_slo(toy, clock, LEVELS, seconds_per_token=0.001)
    assert sum(prefills) == 1200
    assert np.median(prefills) == pytest.approx(9, abs=1)


def test_a_target_that_cannot_be_met_stops_nobody(toy, clock):
    prefills = run_slo(toy, clock, LEVELS, seconds_per_token=1.0)
    assert set(prefills[:-1]) == {math.ceil(0.125 * 63)}


def test_without_a_target_prefill_takes_all(toy, clock):
    prefills = run_slo(toy, clock, {"": ServiceLevel()}, seconds_per_token=0.001)
    assert prefills[0] == 63


@pytest.mark.parametrize("name", ["ttft", "tpot"])
def test_bad_targets_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; expected seconds above 0"):
        ServiceLevel(**{name: 0})
