"""Random requests on a toy engine that checks every batch and every event (see conftest.py)."""

from __future__ import annotations

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nf_scheduler import FinishReason, Request, SchedulerConfig


@st.composite
def scenarios(draw):
    """(config, page size, pages, lag, [(step, request, step of its abort, pending matches)])."""
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    config = SchedulerConfig(
        max_model_len=64,
        max_num_batched_tokens=draw(st.integers(1, 40)),
        max_num_seqs=draw(st.integers(1, 6)),
        max_prefill_chunk=draw(st.none() | st.integers(1, 20)),
    )
    common = draw(st.lists(st.integers(0, 23), max_size=20))
    arrivals = []
    largest = 1
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
        )
        largest = max(largest, -(-(len(prompt) + max_tokens - 1) // page_size))
        abort = draw(st.none() | st.integers(0, 30))
        arrivals.append((draw(st.integers(0, 15)), request, abort, draw(st.integers(0, 3))))
    num_pages = largest + draw(st.integers(0, 12))
    return config, page_size, num_pages, draw(st.integers(0, 2)), arrivals


def play(toy, scenario):
    """Run a scenario to its end; return the engine."""
    config, page_size, num_pages, lag, arrivals = scenario
    restores = {r.prompt_token_ids[:-1].tobytes(): delay for _, r, _, delay in arrivals if delay}
    engine = toy.Engine(toy.Pages(page_size, num_pages, restores), config, lag)
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
    aborted = {r.request_id for _, r, abort, _ in scenario[-1] if abort is not None}
    for name, life in engine.lives.items():
        if life.end.finish_reason is FinishReason.ABORT:
            assert name in aborted
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
    rng = np.random.default_rng(seed)
    config = SchedulerConfig(
        max_model_len=64, max_num_batched_tokens=64, max_num_seqs=8, max_prefill_chunk=chunk
    )
    engine = toy.Engine(toy.Pages(4, 13 + spare), config, lag)
    for index in range(8):
        prompt = rng.integers(0, toy.VOCAB, rng.integers(1, 13), dtype=np.int32)
        engine.add(Request(f"r{index}", prompt, 40))
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    assert all(len(life.received) == 40 for life in engine.lives.values())
