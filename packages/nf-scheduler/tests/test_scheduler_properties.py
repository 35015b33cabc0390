"""Random requests on a toy engine that checks every batch and every event (see conftest.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nf_scheduler import (
    Admission,
    FinishReason,
    OutputLengths,
    Policy,
    PredictedPeak,
    PrefixAffinity,
    Priority,
    Request,
    ReservingAdmission,
    SchedulerConfig,
    ServiceLevel,
    ShortestFirst,
    SloAware,
    TokenBudget,
)

POLICY_MAKERS = st.sampled_from(
    [
        Policy,
        lambda: Priority(ageing_seconds=4.0),
        lambda: ShortestFirst(seconds_per_token=0.5),
        lambda: PrefixAffinity(seconds_per_token=0.5),
        lambda: SloAware({"chat": ServiceLevel(ttft=2.0, tpot=3.0), "": ServiceLevel(ttft=9.0)}),
    ]
)
ADMISSION_MAKERS = st.sampled_from(
    [
        Admission,
        Admission,
        ReservingAdmission,
        lambda: PredictedPeak(OutputLengths(64), 64),
        lambda: PredictedPeak(OutputLengths(64), 64, deviations=0.0),
    ]
)


@st.composite
def scenarios(draw):
    """(config, page size, pages, lag, [(step, request, step of its abort, stored)], …)."""
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    config = SchedulerConfig(
        max_model_len=64,
        max_num_batched_tokens=draw(st.integers(1, 40)),
        max_num_seqs=draw(st.integers(1, 6)),
        max_prefill_chunk=draw(st.none() | st.integers(1, 20)),
    )
    if draw(st.booleans()):  # a smaller budget for small batches
        most = config.max_num_batched_tokens
        limit = draw(st.integers(1, most))
        budget = TokenBudget(draw(st.integers(1, limit)), limit, draw(st.integers(1, most)))
        config = replace(config, budgets=(budget,))
    common = draw(st.lists(st.integers(0, 23), max_size=20))
    arrivals = []
    largest = 1
    several_tenants = draw(st.booleans())
    for index in range(draw(st.integers(1, 9))):
        own = draw(st.lists(st.integers(0, 23), min_size=1, max_size=20))
        prompt = (common if draw(st.booleans()) else []) + own
        max_tokens = draw(st.integers(1, 64 - len(prompt)).map(lambda n: min(n, 20)))
        request = Request(
            f"r{index}",
            np.array(prompt, dtype=np.int32),
            max_tokens,
            min_tokens=draw(st.integers(0, 6)),
            stop_token_ids=draw(st.frozensets(st.integers(0, 23), max_size=4)),
            reuse_prefix=draw(st.booleans()),
            cache_salt=draw(st.sampled_from(["", "", "x"])),
            priority=draw(st.integers(-2, 2)),
            tenant=draw(st.sampled_from(["", "", "y", "z"])) if several_tenants else "",
            request_class=draw(st.sampled_from(["", "chat"])),
            deadline=draw(st.none() | st.integers(1, 60).map(float)),
        )
        if index and draw(st.integers(0, 3)) == 0:  # another answer to an earlier prompt
            other = arrivals[draw(st.integers(0, index - 1))][1]
            prompt = other.prompt_token_ids.tolist()
            salt, limit = other.cache_salt, min(max_tokens, 64 - len(prompt))
            request = replace(
                request,
                prompt_token_ids=other.prompt_token_ids,
                cache_salt=salt,
                max_tokens=limit,
                fork_of=other.request_id,
            )
        largest = max(largest, -(-(len(prompt) + max_tokens - 1) // page_size))
        abort = draw(st.none() | st.integers(0, 30))
        arrivals.append((draw(st.integers(0, 15)), request, abort, draw(st.booleans())))
    num_pages = largest + draw(st.integers(0, 12))
    chance = draw(st.randoms(use_true_random=False))
    parts = {"policy": draw(POLICY_MAKERS)(), "admission": draw(ADMISSION_MAKERS)()}
    return config, page_size, num_pages, draw(st.integers(0, 2)), arrivals, chance, parts


def fate(page_size: int, chance: Random) -> dict[str, Callable]:
    """How long restores take, what comes of them, and what is kept at a preemption."""

    def arrives(num_tokens: int) -> int:
        fewer = chance.randrange(num_tokens) // page_size * page_size
        return chance.choice([num_tokens, num_tokens, fewer, 0])

    return {
        "delay": lambda: chance.choice([0, 1, 3, 25]),
        "arrives": arrives,
        "keeps": lambda num_tokens: chance.choice(
            [num_tokens, num_tokens, chance.randint(0, num_tokens), 0]
        ),
    }


def play(toy, scenario):
    """Run a scenario to its end; return the engine."""
    config, page_size, num_pages, lag, arrivals, chance, parts = scenario
    stored = [request.prompt_token_ids for _, request, _, is_stored in arrivals if is_stored]
    pages = toy.Pages(page_size, num_pages, stored, **fate(page_size, chance))
    engine = toy.Engine(pages, config, lag, **parts)
    step = 0
    while engine.scheduler.has_work or any(start >= step for start, *_ in arrivals):
        for start, request, abort, _ in arrivals:
            if start == step:
                engine.add(request)
            if abort is not None and max(abort, start) == step:
                engine.abort(request.request_id)
        engine.step()
        step += 1
        assert step < 20_000, "the engine does not come to an end"
    engine.check_end()
    return engine


@settings(max_examples=300, deadline=None)
@given(scenario=scenarios())
def test_every_batch_and_every_event_is_right(toy, scenario):
    engine = play(toy, scenario)
    event(f"preemptions: {min(engine.scheduler.num_preemptions, 3)}")
    event(f"lag: {engine.lag}")
    event(f"restores: {min(len(engine.pages.answers), 3)}")
    event(f"interrupted: {min(engine.pages.interrupted, 3)}")
    event(f"forks: {min(len(engine.pages.forks), 3)}")
    event(f"timeouts: {min(engine.scheduler.stats.timeouts, 3)}")
    event(f"policy: {scenario[6]['policy'].name}, admission: {scenario[6]['admission'].name}")
    overdue = {r.request_id for _, r, _, _ in scenario[4] if r.deadline is not None}
    aborted = {r.request_id for _, r, abort, _ in scenario[4] if abort is not None}
    for name, life in engine.lives.items():
        if life.end.finish_reason is FinishReason.ABORT:
            assert name in aborted
        elif life.end.finish_reason is FinishReason.TIMEOUT:
            assert name in overdue
            assert life.end.ledger.finished >= life.request.deadline
        else:
            assert (life.received, life.end.finish_reason) == toy.expected_output(life.request)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lag=st.integers(0, 2),
    chunk=st.integers(1, 64),
    spare=st.integers(0, 4),
)
def test_tokens_do_not_depend_on_lag_chunk_or_pages_under_constant_shortage(
    toy, seed, lag, chunk, spare
):
    """Eight long requests in a pool that holds little more than one of them."""
    shortage(toy, seed, lag, chunk, spare)


def shortage(toy, seed, lag, chunk, spare):
    """Run eight requests of which one alone nearly fills the pool; return the engine."""
    rng = np.random.default_rng(seed)
    config = SchedulerConfig(
        max_model_len=64, max_num_batched_tokens=64, max_num_seqs=8, max_prefill_chunk=chunk
    )
    pages = toy.Pages(4, 13 + spare, **fate(4, Random(seed)))
    engine = toy.Engine(pages, config, lag)
    for index in range(8):
        prompt = rng.integers(0, toy.VOCAB, rng.integers(1, 13), dtype=np.int32)
        engine.add(Request(f"r{index}", prompt, 40))
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    assert all(len(life.received) == 40 for life in engine.lives.values())
    return engine


def test_every_fate_of_a_restore_happens_under_shortage(toy):
    """What the tests above are about happens often, not only now and then."""
    seen: Counter[str] = Counter()
    for seed in range(20):
        engine = shortage(toy, seed, lag=seed % 3, chunk=1 + seed % 7, spare=seed % 5)
        for _, match, come in engine.pages.answers:
            if match.tokens_by_tier["host"]:
                seen["whole" if come == match.num_tokens else "short" if come else "empty"] += 1
        seen["interrupted"] += engine.pages.interrupted
        seen["partial page"] += engine.partial_returns
        seen["decode"] += engine.decode_returns
        seen["waited"] += sum(life.restore_seconds > 0 for life in engine.lives.values())
    assert min(seen.values()) >= 10, seen
    assert len(seen) == 7
